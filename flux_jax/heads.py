"""What an attention reads: queries, keys and values of the fused projections of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.inputs import EPS
from flux_jax.layers import DType, param
from flux_jax.rope import Rotation

# "triton" is one pass over memory, for inference; "jax" is several, and partitioned by XLA. None
# takes the kernel where it can run.
HeadsBackend = Literal["triton", "jax"]
Heads = tuple[Float[Array, "B L H D"], Float[Array, "B L H D"], Float[Array, "B L H D"]]


class RMSScale(nnx.Module):
    """The learned `scale` of an RMS norm over the head width."""

    def __init__(self, width: int, *, dtype: DType, rngs: nnx.Rngs):
        self.scale = param(jax.nn.initializers.ones, rngs, (width,), dtype, (None,))


class QKNorm(nnx.Module):
    """The norms of queries and keys; `attention_heads` computes them."""

    def __init__(self, width: int, *, dtype: DType, rngs: nnx.Rngs):
        self.query_norm = RMSScale(width, dtype=dtype, rngs=rngs)
        self.key_norm = RMSScale(width, dtype=dtype, rngs=rngs)


def attention_heads(
    streams: Sequence[tuple[Float[Array, "B _ _"], QKNorm]],
    rotation: Rotation,
    num_heads: int,
    backend: HeadsBackend | None,
) -> Heads:
    """Normalised, rotated (RoPE) queries and keys, and values: `pallas_kernels.attention_heads`.

    Args:
      streams: of each, joined in this order, a fused projection (B, tokens, W) whose rows begin
        with [q | k | v], and its norms.
      rotation: of all tokens.
      num_heads: H.
      backend: see `HeadsBackend`.
    """
    # Late, as everything of `pallas_kernels`.
    from pallas_kernels import heads

    projections = [
        heads.Projection(array, norm.query_norm.scale[...], norm.key_norm.scale[...])
        for array, norm in streams
    ]
    return heads.attention_heads(projections, *rotation, heads=num_heads, eps=EPS, backend=backend)
