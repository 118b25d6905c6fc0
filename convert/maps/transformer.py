"""FLUX.1 transformers: `flux1-dev.safetensors` and diffusers' `FluxTransformer2DModel` to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.maps.fields import read_fields, refuse_unless
from convert.maps.shapes import count
from convert.rules import Map, Rule
from convert.transforms import SWAP_HALVES, Rows, Shape
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError

_WHAT = "transformer config"


def bfl_map(config: FluxConfig) -> Map:
    """Names in `flux1-dev.safetensors`: ours, but where the reference has anonymous sequences."""
    del config
    same = (
        "{img_in|txt_in|final_layer.linear}.{p}",
        "{time_in|vector_in|guidance_in}.{in_layer|out_layer}.{p}",
        "double_blocks.{i}.{img|txt}_mod.lin.{p}",
        "double_blocks.{i}.{img|txt}_attn.{qkv|proj}.{p}",
        "double_blocks.{i}.{img|txt}_attn.norm.{query|key}_norm.scale",
        "single_blocks.{i}.{linear1|linear2|modulation.lin}.{p}",
        "single_blocks.{i}.norm.{query|key}_norm.scale",
    )
    block = "double_blocks.{i}."
    return Map(
        name="Black Forest Labs Flux",
        rules=(
            *(Rule(name, name) for name in same),
            Rule(block + "{img|txt}_mlp.0.{p}", block + "{img|txt}_mlp.in_layer.{p}"),
            Rule(block + "{img|txt}_mlp.2.{p}", block + "{img|txt}_mlp.out_layer.{p}"),
            Rule("final_layer.adaLN_modulation.1.{p}", "final_layer.adaLN_modulation.{p}"),
        ),
    )


def _embedder_rules() -> list[Rule]:
    rules = []
    for theirs, ours in (
        ("timestep_embedder", "time_in"),
        ("text_embedder", "vector_in"),
        ("guidance_embedder", "guidance_in"),
    ):
        stem = f"time_text_embed.{theirs}."
        rules += [
            Rule(stem + "linear_1.{p}", ours + ".in_layer.{p}"),
            Rule(stem + "linear_2.{p}", ours + ".out_layer.{p}"),
        ]
    return rules


def _double_rules() -> list[Rule]:
    block, ours = "transformer_blocks.{i}.", "double_blocks.{i}."
    rules = [
        Rule(block + "norm1.linear.{p}", ours + "img_mod.lin.{p}"),
        Rule(block + "norm1_context.linear.{p}", ours + "txt_mod.lin.{p}"),
        Rule(block + "attn.to_out.0.{p}", ours + "img_attn.proj.{p}"),
        Rule(block + "attn.to_add_out.{p}", ours + "txt_attn.proj.{p}"),
        Rule(block + "attn.norm_q.weight", ours + "img_attn.norm.query_norm.scale"),
        Rule(block + "attn.norm_k.weight", ours + "img_attn.norm.key_norm.scale"),
        Rule(block + "attn.norm_added_q.weight", ours + "txt_attn.norm.query_norm.scale"),
        Rule(block + "attn.norm_added_k.weight", ours + "txt_attn.norm.key_norm.scale"),
        Rule(block + "ff.net.0.proj.{p}", ours + "img_mlp.in_layer.{p}"),
        Rule(block + "ff.net.2.{p}", ours + "img_mlp.out_layer.{p}"),
        Rule(block + "ff_context.net.0.proj.{p}", ours + "txt_mlp.in_layer.{p}"),
        Rule(block + "ff_context.net.2.{p}", ours + "txt_mlp.out_layer.{p}"),
    ]
    for part, (image, text) in enumerate(
        (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))
    ):
        rows = Rows(part, of=3)
        rules += [
            Rule(block + f"attn.{image}.{{p}}", ours + "img_attn.qkv.{p}", rows),
            Rule(block + f"attn.{text}.{{p}}", ours + "txt_attn.qkv.{p}", rows),
        ]
    return rules


def _single_rules(config: FluxConfig) -> list[Rule]:
    block, ours = "single_transformer_blocks.{i}.", "single_blocks.{i}."
    width = config.hidden_size
    sizes = (width, width, width, config.mlp_hidden)
    rules = [
        Rule(block + "norm.linear.{p}", ours + "modulation.lin.{p}"),
        Rule(block + "attn.norm_q.weight", ours + "norm.query_norm.scale"),
        Rule(block + "attn.norm_k.weight", ours + "norm.key_norm.scale"),
        Rule(block + "proj_out.{p}", ours + "linear2.{p}"),
    ]
    for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        rows = Rows(part, sizes=sizes)
        rules.append(Rule(block + name + ".{p}", ours + "linear1.{p}", rows))
    return rules


def diffusers_map(config: FluxConfig) -> Map:
    """Names in the `transformer` folder of a diffusers pipeline.

    diffusers keeps q, k, v (and the MLP's first linear of a single block) apart, which are rows of
    one weight here. Its last modulation yields scale, then shift; the reference's, and ours, shift
    first.
    """
    return Map(
        name="diffusers FluxTransformer2DModel",
        rules=(
            Rule("x_embedder.{p}", "img_in.{p}"),
            Rule("context_embedder.{p}", "txt_in.{p}"),
            *_embedder_rules(),
            *_double_rules(),
            *_single_rules(config),
            Rule("proj_out.{p}", "final_layer.linear.{p}"),
            Rule("norm_out.linear.{p}", "final_layer.adaLN_modulation.{p}", SWAP_HALVES),
        ),
    )


def config_from_hf(raw: Mapping[str, Any]) -> FluxConfig:
    """Our config from diffusers' `config.json`.

    Raises:
      UserError: another architecture, a variant with other inputs (Fill, the Canny and Depth
        models), or fields missing or of another type.
    """
    heads, width = raw.get("num_attention_heads", 24), raw.get("attention_head_dim", 128)
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        raise UserError(
            f"{_WHAT}: num_attention_heads and attention_head_dim must be positive integers, got "
            f"{heads!r} and {width!r}"
        )
    # What diffusers takes for a field that is left out.
    in_channels = raw.get("in_channels", 64)
    translated = {
        "in_channels": in_channels,
        "vec_in_dim": raw.get("pooled_projection_dim", 768),
        "context_in_dim": raw.get("joint_attention_dim", 4096),
        "hidden_size": heads * width,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": raw.get("num_layers", 19),
        "depth_single_blocks": raw.get("num_single_layers", 38),
        "axes_dim": raw.get("axes_dims_rope", (16, 56, 56)),
        "theta": 10_000,
        "guidance_embed": raw.get("guidance_embeds", False),
    }
    out_channels = raw.get("out_channels")
    fixed = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "out_channels": in_channels}
    stated = {**raw, "out_channels": in_channels if out_channels is None else out_channels}
    refuse_unless(stated, fixed, what=_WHAT)
    return FluxConfig(**read_fields(translated, FluxConfig, what=_WHAT))


def config_to_hf(config: FluxConfig) -> dict[str, Any]:
    """A `config.json` with which diffusers builds the same transformer.

    Raises:
      UserError: diffusers has no such model.
    """
    if config.mlp_hidden != 4 * config.hidden_size or config.theta != 10_000:
        raise UserError(
            "diffusers' FLUX transformer has mlp_ratio 4 and theta 10000, this one has "
            f"{config.mlp_ratio} and {config.theta}; it can be written with --to bfl"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


# Rotary widths cannot be seen in the weights. BFL's models all have heads of 128.
_AXES_OF_HEAD = {128: (16, 56, 56)}


def config_from_shapes(shapes: Mapping[str, Shape]) -> FluxConfig:
    """Our config, guessed from the tensors of a single file.

    Args:
      shapes: by name, without prefix.

    Raises:
      UserError: tensors that the guess needs are missing, or the model is a variant with other
        inputs, or of another head width than BFL's.
    """

    def shape(name: str, dims: int) -> Shape:
        found = shapes.get(name)
        if found is None or len(found) != dims:
            problem = "is missing" if found is None else f"has shape {list(found)}"
            raise UserError(f"not a FLUX.1 transformer: tensor `{name}` {problem}")
        return found

    width, in_channels = shape("img_in.weight", 2)
    (head,) = shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    out_channels = shape("final_layer.linear.weight", 2)[0]
    if in_channels != out_channels:
        raise UserError(
            f"takes {in_channels} channels and gives {out_channels}: a Fill, Canny or "
            "Depth variant, which is not supported"
        )
    if head not in _AXES_OF_HEAD or width % head:
        raise UserError(
            f"heads of width {head} at hidden size {width}: the rotary widths cannot be "
            "told from the weights; expected heads of width 128"
        )
    return FluxConfig(
        in_channels=in_channels,
        vec_in_dim=shape("vector_in.in_layer.weight", 2)[1],
        context_in_dim=shape("txt_in.weight", 2)[1],
        hidden_size=width,
        mlp_ratio=shape("double_blocks.0.img_mlp.0.weight", 2)[0] / width,
        num_heads=width // head,
        depth=count(shapes, "double_blocks"),
        depth_single_blocks=count(shapes, "single_blocks"),
        axes_dim=_AXES_OF_HEAD[head],
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )
