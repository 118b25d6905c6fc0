"""The CLIP text encoder by itself; tests/parity compares it with transformers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.clip import CLIPTextEncoder
from flux_jax.configs import CLIPTextConfig
from flux_jax.errors import UserError
from flux_jax.functional import ModuleFunction
from tests.random_module import random_module

CONFIG = CLIPTextConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
)
encode = ModuleFunction(CLIPTextEncoder.__call__)


def test_a_token_sees_only_those_before_it():
    bound = encode.bind(random_module("text_encoder", CONFIG))
    ids = jnp.asarray([[3, 4, 5, 6]])
    out = bound(ids).last_hidden_state
    other = bound(ids.at[0, 2].set(9)).last_hidden_state
    np.testing.assert_array_equal(out[0, :2], other[0, :2])
    for row in (2, 3):
        assert float(jnp.max(jnp.abs(out[0, row] - other[0, row]))) > 1e-3


@pytest.mark.parametrize(
    ("eos_token_id", "expected"),
    [
        (2, [1, 3]),  # the first of the largest id
        (7, [2, 0]),  # the first 7; the start where there is none
    ],
)
def test_pooled_is_the_state_of_the_end_token(eos_token_id, expected):
    config = dataclasses.replace(CONFIG, eos_token_id=eos_token_id)
    ids = jnp.asarray([[1, 49, 7, 49, 7], [1, 2, 3, 49, 49]])
    out = encode.bind(random_module("text_encoder", config))(ids)
    for row, position in enumerate(expected):
        np.testing.assert_array_equal(out.pooled[row], out.last_hidden_state[row, position])


def test_the_activation_is_the_one_of_the_config():
    ids = jnp.asarray([[1, 2, 3]])
    outs = [
        encode.bind(random_module("text_encoder", dataclasses.replace(CONFIG, hidden_act=name)))(
            ids
        )
        for name in ("gelu", "quick_gelu")
    ]
    assert float(jnp.max(jnp.abs(outs[0].pooled - outs[1].pooled))) > 1e-4


def test_an_encoder_is_built_from_a_seed():
    module = CLIPTextEncoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    out = encode.bind(module)(jnp.zeros((1, 3), jnp.int32))
    assert out.pooled.dtype == jnp.bfloat16
    assert bool(jnp.all(jnp.isfinite(out.pooled.astype(jnp.float32))))


def test_an_unknown_activation_is_refused():
    config = dataclasses.replace(CONFIG, hidden_act="relu")
    with pytest.raises(UserError, match="hidden_act must be one of quick_gelu, gelu, got 'relu'"):
        CLIPTextEncoder(config, rngs=nnx.Rngs(0))


def test_heads_must_divide_the_width():
    config = dataclasses.replace(CONFIG, num_attention_heads=5)
    with pytest.raises(UserError, match="multiple of num_attention_heads, got 32 and 5"):
        CLIPTextEncoder(config, rngs=nnx.Rngs(0))


def test_more_tokens_than_positions_are_refused():
    encoder = random_module("text_encoder", CONFIG)
    with pytest.raises(ValueError, match="ids has 13 tokens, the model has 12 positions"):
        encoder(jnp.zeros((1, 13), jnp.int32))
