"""KL autoencoders: diffusers' `AutoencoderKL` and `ae.safetensors` to our `Autoencoder`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.maps.fields import read_fields, refuse_unless
from convert.maps.shapes import count
from convert.rules import Map, Rule
from convert.transforms import CONV_TO_LINEAR, Shape
from flux_jax.configs import AutoencoderConfig
from flux_jax.errors import UserError

_WHAT = "autoencoder config"
_SIDE, _RESNET = "{encoder|decoder}.", "{norm1|conv1|norm2|conv2}.{p}"
_MID, _OUR_MID = _SIDE + "mid_block.", _SIDE + "mid."

_DIFFUSERS_RULES = (
    Rule(_SIDE + "{conv_in|conv_out}.{p}", _SIDE + "{conv_in|conv_out}.{p}"),
    Rule(_SIDE + "conv_norm_out.{p}", _SIDE + "norm_out.{p}"),
    Rule(_MID + "resnets.0." + _RESNET, _OUR_MID + "block_1." + _RESNET),
    Rule(_MID + "resnets.1." + _RESNET, _OUR_MID + "block_2." + _RESNET),
    Rule(_MID + "attentions.0.group_norm.{p}", _OUR_MID + "attn_1.norm.{p}"),
    Rule(_MID + "attentions.0.to_{q|k|v}.{p}", _OUR_MID + "attn_1.{q|k|v}.{p}"),
    Rule(_MID + "attentions.0.to_out.0.{p}", _OUR_MID + "attn_1.proj_out.{p}"),
)


def _level_rules(theirs: str, ours: str, sampler: str) -> tuple[Rule, ...]:
    """Rules of one resolution; `theirs` and `ours` are what the names begin with."""
    return (
        Rule(theirs + ".resnets.{i}." + _RESNET, ours + ".block.{i}." + _RESNET),
        Rule(theirs + ".resnets.{i}.conv_shortcut.{p}", ours + ".block.{i}.nin_shortcut.{p}"),
        Rule(f"{theirs}.{sampler}rs.0.conv.{{p}}", f"{ours}.{sampler}.conv.{{p}}"),
    )


def diffusers_map(config: AutoencoderConfig) -> Map:
    """Names in the `vae` folder of a diffusers pipeline.

    diffusers counts the decoder's levels in the order in which they run, from the lowest
    resolution; Black Forest Labs, and we, from the highest.
    """
    levels = len(config.block_out_channels)
    rules = list(_DIFFUSERS_RULES)
    for i in range(levels):
        rules += _level_rules(f"encoder.down_blocks.{i}", f"encoder.down.{i}", "downsample")
        up = levels - 1 - i
        rules += _level_rules(f"decoder.up_blocks.{i}", f"decoder.up.{up}", "upsample")
    return Map(name="diffusers AutoencoderKL", rules=tuple(rules))


def bfl_map(config: AutoencoderConfig) -> Map:
    """Names in `ae.safetensors`: ours, with 1x1 convolutions for the linears of the attention."""
    del config
    level, linear = "{encoder.down|decoder.up}.{i}.", _OUR_MID + "attn_1.{q|k|v|proj_out}."
    same = (
        _SIDE + "{conv_in|conv_out|norm_out}.{p}",
        _OUR_MID + "{block_1|block_2}." + _RESNET,
        _OUR_MID + "attn_1.norm.{p}",
        linear + "bias",
        level + "block.{j}." + _RESNET,
        level + "block.{j}.nin_shortcut.{p}",
        level + "{downsample|upsample}.conv.{p}",
    )
    return Map(
        name="Black Forest Labs AutoEncoder",
        rules=(
            *(Rule(name, name) for name in same),
            Rule(linear + "weight", linear + "weight", CONV_TO_LINEAR),
        ),
    )


def config_from_hf(raw: Mapping[str, Any]) -> AutoencoderConfig:
    """Our config from diffusers' `config.json`.

    Raises:
      UserError: an autoencoder of another make (Stable Diffusion's, FLUX.2's), or fields missing
        or of another type.
    """
    defaults = {"shift_factor": 0.0, "mid_block_add_attention": True}
    fields = read_fields(raw, AutoencoderConfig, what=_WHAT, defaults=defaults)
    levels = len(fields["block_out_channels"])
    fixed = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    # diffusers takes true for these two when they are left out.
    stated = {"use_quant_conv": True, "use_post_quant_conv": True, **raw}
    refuse_unless(stated, fixed, what=_WHAT)
    return AutoencoderConfig(**fields)


def config_to_hf(config: AutoencoderConfig) -> dict[str, Any]:
    """A `config.json` with which diffusers builds the same autoencoder."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **dataclasses.asdict(config),
        "block_out_channels": list(config.block_out_channels),
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def config_from_shapes(shapes: Mapping[str, Shape]) -> AutoencoderConfig:
    """Our config, guessed from the tensors of `ae.safetensors`; its constants are FLUX.1's.

    Args:
      shapes: by name, without prefix.

    Raises:
      UserError: Stable Diffusion's autoencoder.
      KeyError, IndexError: a tensor that the guess needs is missing or of another shape.
    """
    if "quant_conv.weight" in shapes:
        raise UserError("this is an autoencoder of Stable Diffusion; expected FLUX.1's")
    levels = count(shapes, r"encoder\.down")
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)]
    return AutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=tuple(widths),
        layers_per_block=count(shapes, r"encoder\.down\.0\.block"),
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
    )
