"""Rows of activations to int8 in one pass over memory, on Hopper; normalised first if asked.

A warpgroup takes a row at a time, holds it in registers, and reads the next one meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels.mosaic_api import plgpu

# Of a warpgroup; a row must be a multiple of it.
THREADS = 128
# Of rows that a multiprocessor works on at once.
PER_MULTIPROCESSOR = 8
# Adding it rounds to an integer, halves to even, and leaves that in the low bits: conversions run
# at a quarter of the rate of additions. 1.5 * 2^23, and its bits.
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000


class Modulation(NamedTuple):
    """Layer norm, then `* (1 + gain) + shift`; gain and shift are (K,) or None."""

    gain: Any
    shift: Any
    eps: float


def vector_size(columns: int, bits: int) -> int:
    """Elements a thread reads at once: the widest that divides a row, at most 16 bytes."""
    size = 128 // bits
    while size > 1 and columns % (THREADS * size):
        size //= 2
    return size


def quantize_rows(
    x: Float[Array, "M K"],
    *,
    multiprocessors: int,
    norm: Modulation | None = None,
    per_multiprocessor: int = PER_MULTIPROCESSOR,
    interpret: Any = None,
) -> tuple[Int8[Array, "M K"], Float[Array, " M"], Int32[Array, " M"]]:
    """Each row to int8 with its own scale, as `reference.quantize_activations` does.

    Args:
      x: (M, K), K a multiple of 128.
      multiprocessors: of the device.
      norm: what is done to a row first, in float32.
      per_multiprocessor: how many rows it works on at once.
      interpret: None on a GPU, else the parameters of Pallas' GPU interpret mode.

    Returns:
      (q, scale, row_sum): int8 (M, K); float32 (M,); int32 (M,), the sums of q.
    """
    (m, k), native = x.shape, interpret is None
    layout = plgpu.Layout.WG_STRIDED((k,), vec_size=vector_size(k, 8 * x.dtype.itemsize))
    blocks = min(per_multiprocessor * multiprocessors, m)
    vectors = () if norm is None else tuple(v for v in norm[:2] if v is not None)

    def read(ref):
        return plgpu.load(ref, (), layout=layout) if native else ref[...]

    def body(x_gmem, *refs):
        *vector_refs, q_gmem, scale_gmem, sum_gmem = refs
        block = lax.axis_index("block")

        def row(index, loaded):
            here = block + index * blocks
            following = read(x_gmem.at[lax.min(here + blocks, m - 1)])
            value = loaded.astype(jnp.float32)
            if norm is not None:
                value = _normalized(value, norm, list(vector_refs), read)
            q, largest = _to_int8(value)
            sum_gmem[here] = jnp.sum(q)
            scale_gmem[here] = largest * jnp.float32(1 / 127)
            q_gmem[here] = q.astype(jnp.int8)
            return following

        mine = lax.div(m - block + blocks - 1, blocks)
        lax.fori_loop(0, mine, row, read(x_gmem.at[block]))

    call = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((m, k), jnp.int8),
            jax.ShapeDtypeStruct((m,), jnp.float32),
            jax.ShapeDtypeStruct((m,), jnp.int32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **({} if native else {"interpret": interpret}),
    )
    return call(x, *vectors)


def _normalized(value: Any, norm: Modulation, refs: list[Any], read: Any) -> Any:
    """A row's layer norm, modulated, in float32."""
    size = value.shape[0]
    value = value - jnp.sum(value) * (1.0 / size)
    variance = jnp.sum(value * value) * (1.0 / size)
    value = value * lax.rsqrt(variance + norm.eps)
    if norm.gain is not None:
        value = value * (read(refs.pop(0)).astype(jnp.float32) + 1.0)
    if norm.shift is not None:
        value = value + read(refs.pop(0)).astype(jnp.float32)
    return value


def _to_int8(value: Any) -> tuple[Any, Any]:
    """(q, largest): q of a row as int32, and the row's largest magnitude."""
    largest = jnp.max(jnp.abs(value))
    inverse = jnp.where(largest > 0, 127.0 / jnp.where(largest > 0, largest, 1.0), 0.0)
    # It overflows for numbers that are zero for any purpose.
    inverse = jnp.where(inverse > 3e38, 0.0, inverse)
    q = jnp.maximum(jnp.minimum(value * inverse, 127.0), -127.0)
    return lax.bitcast_convert_type(q + ROUNDER, jnp.int32) - ROUNDER_BITS, largest
