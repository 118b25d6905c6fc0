"""The T5 encoder by itself; tests/parity compares it with transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.configs import T5Config
from flux_jax.functional import ModuleFunction
from flux_jax.t5 import T5Encoder, position_bias, relative_buckets
from tests.random_module import random_module

CONFIG = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
encode = ModuleFunction(T5Encoder.__call__)


def test_buckets_by_hand():
    # 8 buckets: 4 each way, of which 2 exact (0, 1) and 2 for 2-3 and 4 on (max_distance 8).
    by_distance = {-9: 3, -4: 3, -3: 2, -2: 2, -1: 1, 0: 0, 1: 5, 2: 6, 3: 6, 4: 7, 9: 7}
    buckets = relative_buckets(10, num_buckets=8, max_distance=8)
    assert {d: int(buckets[d + 9]) for d in by_distance} == by_distance


def test_position_bias_looks_up_the_bucket_of_key_minus_query():
    encoder = random_module("text_encoder_2", CONFIG)
    length = 40
    bias = np.asarray(position_bias(encoder.relative_attention_bias, CONFIG, length))
    table = np.asarray(encoder.relative_attention_bias.weight[...])
    buckets = relative_buckets(
        length, CONFIG.relative_attention_num_buckets, CONFIG.relative_attention_max_distance
    )
    assert bias.shape == (1, CONFIG.num_heads, length, length)
    for query, key in ((0, 0), (0, 39), (39, 0), (7, 30), (30, 7)):
        np.testing.assert_array_equal(
            bias[0, :, query, key], table[buckets[key - query + length - 1]]
        )


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch():
    encoder = random_module("text_encoder_2", CONFIG)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 11))
    bound = encode.bind(encoder)
    together = bound(jnp.asarray(ids))
    for i in range(3):
        alone = bound(jnp.asarray(ids[i : i + 1]))
        np.testing.assert_allclose(alone[0], together[i], rtol=2e-6, atol=2e-6)


def test_order_of_the_tokens_matters_both_ways():
    encoder = random_module("text_encoder_2", CONFIG)
    bound = encode.bind(encoder)
    ids = jnp.asarray([[3, 4, 5, 6]])
    out = bound(ids)
    for changed, kept in ((0, 3), (3, 0)):  # attention looks ahead and back
        other = bound(ids.at[0, changed].set(9))
        assert float(jnp.max(jnp.abs(other[0, kept] - out[0, kept]))) > 1e-3


def test_an_encoder_is_built_from_a_seed():
    module = T5Encoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    out = encode.bind(module)(jnp.zeros((1, 3), jnp.int32))
    assert out.dtype == jnp.bfloat16
    assert out.shape == (1, 3, CONFIG.d_model)
    assert bool(jnp.all(jnp.isfinite(out.astype(jnp.float32))))


def test_float16_is_refused():
    with pytest.raises(ValueError, match="must be bfloat16 or float32 for T5, got float16"):
        T5Encoder(CONFIG, dtype=jnp.float16, rngs=nnx.Rngs(0))
