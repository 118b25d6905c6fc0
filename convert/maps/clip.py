"""CLIP text towers: transformers' `CLIPTextModel` to `flux_jax.clip.CLIPTextEncoder`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.maps.fields import read_fields, refuse_unless
from convert.maps.shapes import count
from convert.rules import Ignored, Map, Rule
from convert.transforms import Shape
from flux_jax.configs import CLIPTextConfig

_WHAT = "CLIP text config"
_LAYER = "encoder.layers.{i}."

_RULES = (
    Rule("embeddings.{token|position}_embedding.weight", "{token|position}_embedding.weight"),
    Rule(_LAYER + "layer_norm{1|2}.{p}", "blocks.{i}.norm{1|2}.{p}"),
    Rule(_LAYER + "self_attn.{q|k|v|out}_proj.{p}", "blocks.{i}.attention.{q|k|v|out}.{p}"),
    Rule(_LAYER + "mlp.{fc1|fc2}.{p}", "blocks.{i}.mlp.{fc1|fc2}.{p}"),
    Rule("final_layer_norm.{p}", "final_norm.{p}"),
)


def diffusers_map(config: CLIPTextConfig) -> Map:
    """Names in the `text_encoder` folder of a diffusers pipeline; the same at any size.

    Until transformers 5 every name began with `text_model.`, and FLUX.1's files do; version 5
    writes none and reads both. We write it, for readers of either age.
    """
    del config
    return Map(
        name="transformers CLIPTextModel",
        rules=_RULES,
        ignored=(Ignored("embeddings.position_ids", "0, 1, 2, ...: computed, not stored"),),
        prefixes=("text_model.",),
        export_prefix="text_model.",
    )


def config_from_hf(raw: Mapping[str, Any]) -> CLIPTextConfig:
    """Our config from transformers' `config.json`.

    Raises:
      UserError: not a CLIP text model, or fields missing or of another type.
    """
    refuse_unless(raw, {"model_type": "clip_text_model"}, what=_WHAT)
    defaults = {"eos_token_id": 49_407, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    fields = read_fields(
        raw, CLIPTextConfig, what=_WHAT, defaults=defaults, may_be_zero=("eos_token_id",)
    )
    return CLIPTextConfig(**fields)


def config_to_hf(config: CLIPTextConfig) -> dict[str, Any]:
    """A `config.json` with which transformers builds the same text model."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **dataclasses.asdict(config),
        "projection_dim": config.hidden_size,
        "attention_dropout": 0.0,
        # As in FLUX.1's file. The tokenizer goes by its own; these only fill the fields.
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def config_from_shapes(shapes: Mapping[str, Shape]) -> CLIPTextConfig:
    """Our config, guessed from the tensors of a single file.

    Args:
      shapes: by name, without the file's prefix but with `text_model.`.

    Raises:
      KeyError, IndexError, ValueError: a tensor that the guess needs is missing or of another
        shape.
    """
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count(shapes, r"text_model\.encoder\.layers"),
        num_attention_heads=width // 64,  # of every CLIP published
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
    )
