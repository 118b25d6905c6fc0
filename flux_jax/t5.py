"""The encoder of T5 v1.1, after `T5EncoderModel` of transformers (`models/t5/modeling_t5.py`).

FLUX.1 reads its last hidden states, 512 tokens padded and unmasked. Two habits of T5 are easy to
lose: scores are not divided by sqrt(d_kv), and one table of relative position biases, owned by the
first block upstream, serves all blocks.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.attention import attention
from flux_jax.configs import T5Config
from flux_jax.layers import DType, Embedding, Linear, param, rms_norm


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, " D"]:
    """Bucket of each relative position from `-(length - 1)` to `length - 1`.

    Half of the buckets are for keys after the query. In each half, the nearer distances have a
    bucket each and the farther ones share buckets that widen logarithmically up to `max_distance`.

    Evaluated in NumPy while tracing: lengths are static, and a logarithm that differs in its last
    bit between backends would move a distance at a bucket's edge (8 x 16 ^ (n / 8)) to the next.

    Args:
      length: number of tokens.
      num_buckets: of both directions together.
      max_distance: distances from here on share the last bucket.

    Returns:
      (2 * length - 1,), in [0, num_buckets).
    """
    position = np.arange(-(length - 1), length)
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(position)
    # float32 as upstream, for the same rounding at the edges of the buckets.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(distance < exact, distance, far) + np.where(position > 0, half, 0)


def position_bias(table: Embedding, config: T5Config, length: int) -> Float[Array, "1 H T T"]:
    """What every block adds to its scores, in float32.

    Args:
      table: the encoder's `relative_attention_bias`.
      config: of the encoder.
      length: number of tokens T.

    Returns:
      (1, num_heads, T, T), indexed by query, then key.
    """
    buckets = relative_buckets(
        length, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    by_distance = table(jnp.asarray(buckets, jnp.int32))
    position = jnp.arange(length, dtype=jnp.int32)
    distance = position[None, :] - position[:, None] + (length - 1)
    bias = jnp.take(by_distance.astype(jnp.float32).T, distance, axis=1)
    return bias[None]


class RMSNorm(nnx.Module):
    """Root-mean-square norm with scale `weight` (features,), the variance in float32."""

    def __init__(self, features: int, *, eps: float, dtype: DType, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = param(jax.nn.initializers.ones, rngs, (features,), dtype, ("embed",))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return rms_norm(x, self.weight[...], self.eps)


class T5Attention(nnx.Module):
    """Unscaled self-attention without biases; the inner width is num_heads * d_kv."""

    def __init__(self, config: T5Config, *, dtype: DType, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        inner = config.num_heads * config.d_kv
        into: Any = dict(bias=False, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        # The missing 1 / sqrt(d_kv) of the scores is in q's initial scale.
        q_init = jax.nn.initializers.normal((config.d_model * config.d_kv) ** -0.5)
        self.q = Linear(config.d_model, inner, init=q_init, **into)
        self.k = Linear(config.d_model, inner, **into)
        self.v = Linear(config.d_model, inner, **into)
        self.o = Linear(
            inner, config.d_model, bias=False, axes=("embed", "heads"), dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T C"], position_bias: Float[Array, "1 H T T"]
    ) -> Float[Array, "B T C"]:
        batch, length, _ = x.shape
        q, k, v = (
            linear(x).reshape(batch, length, self.num_heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        mixed = attention(q, k, v, bias=position_bias, scale=1.0)
        return self.o(mixed.reshape(batch, length, -1))


class T5MLP(nnx.Module):
    """`wo(gelu(wi_0(x)) * wi_1(x))`, with the tanh form of GELU."""

    def __init__(self, config: T5Config, *, dtype: DType, rngs: nnx.Rngs):
        into: Any = dict(bias=False, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.wi_0 = Linear(config.d_model, config.d_ff, **into)
        self.wi_1 = Linear(config.d_model, config.d_ff, **into)
        self.wo = Linear(
            config.d_ff, config.d_model, bias=False, axes=("embed", "mlp"), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        gate = jax.nn.gelu(self.wi_0(x).astype(jnp.float32), approximate=True)
        return self.wo(gate.astype(x.dtype) * self.wi_1(x))


class T5Block(nnx.Module):
    """Self-attention and MLP, each behind an RMS norm and added to the stream."""

    def __init__(self, config: T5Config, *, dtype: DType, rngs: nnx.Rngs):
        eps = config.layer_norm_epsilon
        self.attention_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = T5Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = T5MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T C"], position_bias: Float[Array, "1 H T T"]
    ) -> Float[Array, "B T C"]:
        x = x + self.attention(self.attention_norm(x), position_bias)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Token ids to one embedding a token.

    Attributes:
      token_embedding: `weight` (vocab_size, d_model).
      relative_attention_bias: `weight` (num_buckets, num_heads), shared by all blocks. T5 keeps it
        in its first block; here it is the encoder's own, so that all blocks have the same tree.
      blocks: the layers, in order.
    """

    def __init__(self, config: T5Config, *, dtype: DType = jnp.bfloat16, rngs: nnx.Rngs):
        """Builds the encoder with T5's initial scales.

        Args:
          config: sizes.
          dtype: of the parameters, hence of the computation.
          rngs: `params` stream.

        Raises:
          ValueError: float16 was asked for.
        """
        if jnp.dtype(dtype) == jnp.float16:
            raise ValueError(
                "dtype must be bfloat16 or float32 for T5, got float16, in which the MLPs of "
                "trained T5 v1.1 encoders overflow"
            )
        self.config = config
        self.token_embedding = Embedding(
            config.vocab_size, config.d_model, stddev=1.0, dtype=dtype, rngs=rngs
        )
        self.relative_attention_bias = Embedding(
            config.relative_attention_num_buckets,
            config.num_heads,
            axes=(None, "heads"),
            stddev=config.d_model**-0.5,
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            T5Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(
            config.d_model, eps=config.layer_norm_epsilon, dtype=dtype, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T C"]:
        """Encodes token ids; padding takes part like any token, as in FLUX.1.

        Args:
          ids: (B, T), in [0, vocab_size).

        Returns:
          (B, T, d_model), the last hidden states, in the parameters' dtype.
        """
        x = self.token_embedding(ids)
        bias = position_bias(self.relative_attention_bias, self.config, ids.shape[1])
        for block in self.blocks:
            x = block(x, bias)
        return self.final_norm(x)
