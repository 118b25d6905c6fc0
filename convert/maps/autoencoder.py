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
_RESNET = r"(norm1|conv1|norm2|conv2)\.(weight|bias)"
_MID = r"(encoder|decoder)\.mid_block\."

_DIFFUSERS_RULES = (
    Rule(r"(encoder|decoder)\.(conv_in|conv_out)\.(weight|bias)", r"\1.\2.\3"),
    Rule(r"(encoder|decoder)\.conv_norm_out\.(weight|bias)", r"\1.norm_out.\2"),
    Rule(_MID + r"resnets\.0\." + _RESNET, r"\1.mid.block_1.\2.\3"),
    Rule(_MID + r"resnets\.1\." + _RESNET, r"\1.mid.block_2.\2.\3"),
    Rule(_MID + r"attentions\.0\.group_norm\.(weight|bias)", r"\1.mid.attn_1.norm.\2"),
    Rule(_MID + r"attentions\.0\.to_(q|k|v)\.(weight|bias)", r"\1.mid.attn_1.\2.\3"),
    Rule(_MID + r"attentions\.0\.to_out\.0\.(weight|bias)", r"\1.mid.attn_1.proj_out.\2"),
)


def _level_rules(theirs: str, ours: str, sampler: str) -> tuple[Rule, ...]:
    """Rules of one resolution; `theirs` is a pattern without groups."""
    return (
        Rule(rf"{theirs}\.resnets\.(\d+)\.{_RESNET}", rf"{ours}.block.\1.\2.\3"),
        Rule(
            rf"{theirs}\.resnets\.(\d+)\.conv_shortcut\.(weight|bias)",
            rf"{ours}.block.\1.nin_shortcut.\2",
        ),
        Rule(rf"{theirs}\.{sampler}rs\.0\.conv\.(weight|bias)", rf"{ours}.{sampler}.conv.\1"),
    )


def diffusers_map(config: AutoencoderConfig) -> Map:
    """Names in the `vae` folder of a diffusers pipeline.

    diffusers counts the decoder's levels in the order in which they run, from the lowest
    resolution; Black Forest Labs, and we, from the highest.
    """
    levels = len(config.block_out_channels)
    rules = list(_DIFFUSERS_RULES)
    for i in range(levels):
        rules += _level_rules(rf"encoder\.down_blocks\.{i}", f"encoder.down.{i}", "downsample")
        up = levels - 1 - i
        rules += _level_rules(rf"decoder\.up_blocks\.{i}", f"decoder.up.{up}", "upsample")
    return Map(name="diffusers AutoencoderKL", rules=tuple(rules))


_BFL_LEVEL = r"(encoder\.down|decoder\.up)\.(\d+)\."
_BFL_MID = r"(encoder|decoder)\.mid\."


def bfl_map(config: AutoencoderConfig) -> Map:
    """Names in `ae.safetensors`: ours, with 1x1 convolutions for the linears of the attention."""
    del config
    return Map(
        name="Black Forest Labs AutoEncoder",
        rules=(
            Rule(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)", r"\1.\2.\3"),
            Rule(_BFL_MID + r"(block_1|block_2)\." + _RESNET, r"\1.mid.\2.\3.\4"),
            Rule(_BFL_MID + r"attn_1\.norm\.(weight|bias)", r"\1.mid.attn_1.norm.\2"),
            Rule(
                _BFL_MID + r"attn_1\.(q|k|v|proj_out)\.weight",
                r"\1.mid.attn_1.\2.weight",
                CONV_TO_LINEAR,
            ),
            Rule(_BFL_MID + r"attn_1\.(q|k|v|proj_out)\.bias", r"\1.mid.attn_1.\2.bias"),
            Rule(_BFL_LEVEL + r"block\.(\d+)\." + _RESNET, r"\1.\2.block.\3.\4.\5"),
            Rule(
                _BFL_LEVEL + r"block\.(\d+)\.nin_shortcut\.(weight|bias)",
                r"\1.\2.block.\3.nin_shortcut.\4",
            ),
            Rule(_BFL_LEVEL + r"(downsample|upsample)\.conv\.(weight|bias)", r"\1.\2.\3.conv.\4"),
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
