"""What an attention reads: queries, keys and values of the fused projections of its streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

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
    """The norms of queries and keys; `ProjectedHeads` computes them."""

    def __init__(self, width: int, *, dtype: DType, rngs: nnx.Rngs):
        self.query_norm = RMSScale(width, dtype=dtype, rngs=rngs)
        self.key_norm = RMSScale(width, dtype=dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedHeads:
    """Normalised, rotated (RoPE) queries and keys, and values: computed when they are asked for.

    By `pallas_kernels.heads`, in the layout that whoever asks wants them in.

    Attributes:
      streams: of each, joined in this order, a fused projection (B, tokens, W) whose rows begin
        with [q | k | v], and its norms.
      rotation: of all tokens.
      num_heads: H.
      backend: see `HeadsBackend`.
    """

    streams: Sequence[tuple[Float[Array, "B _ _"], QKNorm]]
    rotation: Rotation
    num_heads: int
    backend: HeadsBackend | None

    def apart(self) -> Heads:
        """q, k and v."""
        # Late, as everything of `pallas_kernels`.
        from pallas_kernels import heads

        return heads.attention_heads(*self._given(), **self._settings())

    def grouped(self, groups: int) -> Float[Array, "G 3 B L h D"]:
        """q, k and v of each of some groups of heads."""
        from pallas_kernels import heads

        return heads.grouped_heads(*self._given(), groups=groups, **self._settings())

    def _given(self) -> tuple[Any, ...]:
        from pallas_kernels.heads import Projection

        projections = [
            Projection(array, norm.query_norm.scale[...], norm.key_norm.scale[...])
            for array, norm in self.streams
        ]
        return projections, *self.rotation

    def _settings(self) -> dict[str, Any]:
        return {"heads": self.num_heads, "eps": EPS, "backend": self.backend}
