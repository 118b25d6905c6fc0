"""T5 v1.1 encoders: transformers' `T5EncoderModel` to `flux_jax.t5.T5Encoder`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.maps.fields import read_fields, refuse_unless
from convert.maps.shapes import count
from convert.rules import Ignored, Map, Rule
from convert.transforms import Shape
from flux_jax.configs import T5Config
from flux_jax.errors import UserError

_WHAT = "T5 config"
_BLOCK, _OURS = "encoder.block.{i}.", "blocks.{i}."

_RULES = (
    Rule("shared.weight", "token_embedding.weight"),
    Rule(_BLOCK + "layer.0.SelfAttention.{q|k|v|o}.weight", _OURS + "attention.{q|k|v|o}.weight"),
    # The first block's table serves all blocks.
    Rule(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_attention_bias.weight",
    ),
    Rule(_BLOCK + "layer.0.layer_norm.weight", _OURS + "attention_norm.weight"),
    Rule(
        _BLOCK + "layer.1.DenseReluDense.{wi_0|wi_1|wo}.weight", _OURS + "mlp.{wi_0|wi_1|wo}.weight"
    ),
    Rule(_BLOCK + "layer.1.layer_norm.weight", _OURS + "mlp_norm.weight"),
    Rule("encoder.final_layer_norm.weight", "final_norm.weight"),
)


def diffusers_map(config: T5Config) -> Map:
    """Names in the `text_encoder_2` folder of a diffusers pipeline; the same at any size."""
    del config
    return Map(
        name="transformers T5EncoderModel",
        rules=_RULES,
        ignored=(
            Ignored(
                "encoder.embed_tokens.weight",
                "the token embedding once more",
                same_as="shared.weight",
            ),
        ),
    )


def config_from_hf(raw: Mapping[str, Any]) -> T5Config:
    """Our config from transformers' `config.json`.

    Raises:
      UserError: not a T5 v1.1 encoder, or fields missing or of another type.
    """
    refuse_unless(raw, {"model_type": "t5"}, what=_WHAT)
    activation = raw.get("feed_forward_proj", "relu")
    if activation != "gated-gelu":
        raise UserError(
            f"{_WHAT}: feed_forward_proj must be 'gated-gelu' (T5 v1.1), got "
            f"{repr(activation)[:60]}; the first T5 and its relu are not supported"
        )
    defaults = {"relative_attention_max_distance": 128}  # older files leave it out
    return T5Config(**read_fields(raw, T5Config, what=_WHAT, defaults=defaults))


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """A `config.json` with which transformers builds the same encoder."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **dataclasses.asdict(config),
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": False,
        "use_cache": False,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def config_from_shapes(shapes: Mapping[str, Shape]) -> T5Config:
    """Our config, guessed from the tensors of a single file.

    Args:
      shapes: by name, without the file's prefix.

    Raises:
      KeyError, IndexError, ValueError, ZeroDivisionError: a tensor that the guess needs is
        missing or of another shape.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    vocab, width = shapes[embedding]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=shapes[f"{attention}.q.weight"][0] // heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=count(shapes, r"encoder\.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
