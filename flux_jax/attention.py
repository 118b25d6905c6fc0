"""Scaled dot-product attention: one function, a choice of implementation.

On an NVIDIA GPU in 16 bits the cuDNN flash kernel runs (549 TFLOP/s at FLUX's shape on one H200,
against 148 for the plain XLA path); elsewhere plain XLA, in chunks of queries once the score
matrix would be large.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flux_jax.sequence import exchange

Implementation = Literal["cudnn", "xla"]

# Largest score matrix (batch x heads x queries x keys) that the XLA path materialises at once:
# 256 MiB in float32.
_MAX_SCORES = 1 << 26


def default_implementation(q: Float[Array, "B Lq H D"]) -> Implementation:
    """cuDNN where it can run: 16-bit inputs on an NVIDIA GPU, head width at most 128."""
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = q.shape[-1]
    fits = head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if jax.default_backend() == "gpu" and sixteen_bit and fits else "xla"


def attention(
    q: Float[Array, "B Lq H D"],
    k: Float[Array, "B Lk H D"],
    v: Float[Array, "B Lk H D"],
    *,
    bias: Float[Array, "#B H Lq Lk"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B Lq H D"]:
    """`softmax(scale * q @ k.T + bias) @ v` per head; the softmax is in float32.

    Where the tokens are split over devices (`flux_jax.sequence`), q, k and v are a part of them and
    attend to all.

    Args:
      q, k, v: queries, keys and values.
      bias: added to the scores before the softmax.
      scale: of the scores; 1 / sqrt(D) by default.
      causal: whether a query sees only the keys up to its own position.
      implementation: "cudnn", "xla", or None for `default_implementation`. A named one never
        falls back.

    Returns:
      (B, Lq, H, D), in q's dtype.
    """
    others = exchange()
    if others is not None:
        if bias is not None or causal:
            raise NotImplementedError("attention over split tokens takes no bias and no mask")
        q, k, v = others.to_heads(q, k, v)
    if implementation is None:
        implementation = "xla" if bias is not None else default_implementation(q)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, queries, heads, _ = q.shape
    scores = batch * heads * queries * k.shape[1]
    if implementation == "xla" and scores > _MAX_SCORES and bias is None and not causal:
        out = _chunked_attention(q, k, v, scale, math.ceil(scores / _MAX_SCORES))
    else:
        out = jax.nn.dot_product_attention(
            q, k, v, bias=bias, scale=scale, is_causal=causal, implementation=implementation
        )
    return out if others is None else others.to_tokens(out)


def _chunked_attention(
    q: Float[Array, "B Lq H D"],
    k: Float[Array, "B Lk H D"],
    v: Float[Array, "B Lk H D"],
    scale: float,
    chunks: int,
) -> Float[Array, "B Lq H D"]:
    """XLA attention over one chunk of queries at a time; the gradient recomputes the scores."""
    batch, queries, heads, width = q.shape
    size = math.ceil(queries / chunks)
    padded = jnp.pad(q, ((0, 0), (0, size * chunks - queries), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, chunks, size, heads, width).swapaxes(0, 1)

    @jax.checkpoint
    def one_chunk(block: Float[Array, "B c H D"]) -> Float[Array, "B c H D"]:
        return jax.nn.dot_product_attention(block, k, v, scale=scale, implementation="xla")

    out = jax.lax.map(one_chunk, blocks).swapaxes(0, 1)
    return out.reshape(batch, size * chunks, heads, width)[:, :queries]
