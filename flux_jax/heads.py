"""What an attention reads: queries, keys and values of the fused projections of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.inputs import EPS
from flux_jax.layers import DType, param, rms_norm
from flux_jax.rope import Rotation, rotate

# "triton" is one pass over memory, for inference; "jax" is several, and partitioned by XLA. None
# takes the kernel where it can run.
HeadsBackend = Literal["triton", "jax"]
Heads = tuple[Float[Array, "B L H D"], Float[Array, "B L H D"], Float[Array, "B L H D"]]


class RMSNorm(nnx.Module):
    """RMS norm over the head width with a learned `scale`."""

    def __init__(self, width: int, *, dtype: DType, rngs: nnx.Rngs):
        self.scale = param(jax.nn.initializers.ones, rngs, (width,), dtype, (None,))

    def __call__(self, x: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
        return rms_norm(x, self.scale[...], EPS)


class QKNorm(nnx.Module):
    """The norms of queries and keys."""

    def __init__(self, width: int, *, dtype: DType, rngs: nnx.Rngs):
        self.query_norm = RMSNorm(width, dtype=dtype, rngs=rngs)
        self.key_norm = RMSNorm(width, dtype=dtype, rngs=rngs)


def attention_heads(
    streams: Sequence[tuple[Float[Array, "B _ _"], QKNorm]],
    rotation: Rotation,
    num_heads: int,
    backend: HeadsBackend | None,
) -> Heads:
    """Normalised and turned queries and keys, and values.

    Args:
      streams: of each, joined in this order, a fused projection (B, tokens, W) whose rows begin
        with [q | k | v], and its norms.
      rotation: of all tokens.
      num_heads: H.
      backend: see `HeadsBackend`.
    """
    if backend != "jax":
        # Late, as everything of `pallas_kernels`.
        from pallas_kernels import heads

        if backend == "triton" or heads.why_not(streams[0][0], rotation[0]) is None:
            projections = [
                heads.Projection(array, norm.query_norm.scale[...], norm.key_norm.scale[...])
                for array, norm in streams
            ]
            return heads.attention_heads(
                projections, *rotation, heads=num_heads, eps=EPS, backend=backend
            )
    width = 3 * num_heads * 2 * rotation[0].shape[1]
    each = [_split(array[..., :width], norm, num_heads) for array, norm in streams]
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*each, strict=True))
    return rotate(q, rotation), rotate(k, rotation), v


def _split(qkv: Float[Array, "B L C3"], norm: QKNorm, num_heads: int) -> Heads:
    batch, length, _ = qkv.shape
    q, k, v = (part.reshape(batch, length, num_heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    return norm.query_norm(q), norm.key_norm(k), v
