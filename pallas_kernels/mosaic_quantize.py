"""Rows of activations to int8 in one pass over memory, on Hopper; normalised first if asked.

A warpgroup takes a row at a time, holds it in registers, and reads the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_api import load, pl, plgpu
from pallas_kernels.mosaic_epilogue import tanh_gelu
from pallas_kernels.reference import MAX_INVERSE, Columns, Quantized

# Of a warpgroup; the columns of a part must be a multiple of it.
THREADS = 128
# Of rows that a multiprocessor works on at once.
PER_MULTIPROCESSOR = 8
# Adding it rounds to an integer, halves to even, and leaves that in the low bits: conversions run
# at a quarter of the rate of additions. 1.5 * 2^23, and its bits.
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000


class Modulation(NamedTuple):
    """Layer norm, then `* (1 + gain) + shift`; gain and shift are None or (B, K), one for each of B
    equal runs of rows."""

    gain: Any
    shift: Any
    eps: float


def vector_size(part: Columns) -> int:
    """Elements a thread reads at once: the widest that lie aligned, at most 16 bytes."""
    size = 16 // part.array.dtype.itemsize
    while size > 1 and (
        part.size % (THREADS * size) or part.start % size or part.array.shape[1] % size
    ):
        size //= 2
    return size


def quantize_rows(
    parts: Sequence[Columns],
    *,
    multiprocessors: int,
    norm: Modulation | None = None,
    per_multiprocessor: int = PER_MULTIPROCESSOR,
    interpret: Any = None,
) -> Quantized:
    """Each row to int8 with its own scale, as `reference.quantize_columns` does.

    Args:
      parts: of arrays (M, W), sizes multiples of 128. A row is all of them, joined.
      multiprocessors: of the device.
      norm: what is done to a row first, in float32; for one part.
      per_multiprocessor: how many rows it works on at once.
      interpret: None on a GPU, else the parameters of Pallas' GPU interpret mode.
    """
    native, m = interpret is None, parts[0].array.shape[0]
    k = sum(part.size for part in parts)
    blocks = min(per_multiprocessor * multiprocessors, m)
    vectors = [] if norm is None else [v for v in norm[:2] if v is not None]

    # What meets element by element is spread over the threads alike.
    narrowest = min((vector_size(Columns(v, 0, k)) for v in vectors), default=16)

    def read(ref, part):
        if not native:
            return ref[...]
        size = min(vector_size(part), narrowest)
        return load(ref, plgpu.Layout.WG_STRIDED((part.size,), vec_size=size))

    def body(*refs):
        part_refs, rest = refs[: len(parts)], refs[len(parts) :]
        vector_refs, (q_gmem, scale_gmem, sum_gmem) = rest[: len(vectors)], rest[len(vectors) :]
        block = lax.axis_index("block")

        def load_row(row):
            return tuple(
                read(ref.at[row, pl.ds(part.start, part.size)], part)
                for ref, part in zip(part_refs, parts, strict=True)
            )

        def vector(ref, row):
            run = lax.div(row, m // ref.shape[0])
            return read(ref.at[run], parts[0]).astype(jnp.float32)

        def row(index, loaded):
            here = block + index * blocks
            following = load_row(lax.min(here + blocks, m - 1))
            values = [value.astype(jnp.float32) for value in loaded]
            values = [
                tanh_gelu(value) if part.gelu else value
                for value, part in zip(values, parts, strict=True)
            ]
            if norm is not None:
                values = [_normalized(values[0], norm, [vector(r, here) for r in vector_refs])]
            inverse, scale = _scales([jnp.max(jnp.abs(value)) for value in values])
            start, total = 0, 0
            for value, part in zip(values, parts, strict=True):
                q = _to_int8(value, inverse)
                total = total + jnp.sum(q, dtype=jnp.int32)
                q_gmem[here, pl.ds(start, part.size)] = q.astype(jnp.int8)
                start += part.size
            # Of a row that is not finite, these are integers beyond int8. What is stored is their
            # low byte: 0, or -1 of a NaN that a GPU made.
            sum_gmem[here] = jnp.where(inverse > 0, total, 0)
            scale_gmem[here] = scale
            return following

        mine = lax.div(m - block + blocks - 1, blocks)
        lax.fori_loop(0, mine, row, load_row(block))

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
            # Of GELU's exponential; nothing else here can be approximated.
            approx_math=any(part.gelu for part in parts),
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **({} if native else {"interpret": interpret}),
    )
    return Quantized(*call(*(part.array for part in parts), *vectors))


def _normalized(value: Any, norm: Modulation, vectors: list[Any]) -> Any:
    """A row's layer norm, modulated, in float32."""
    size = value.shape[0]
    value = value - jnp.sum(value) * (1.0 / size)
    variance = jnp.sum(value * value) * (1.0 / size)
    value = value * lax.rsqrt(variance + norm.eps)
    if norm.gain is not None:
        value = value * (vectors.pop(0) + 1.0)
    if norm.shift is not None:
        value = value + vectors.pop(0)
    return value


def _scales(maxima: list[Any]) -> tuple[Any, Any]:
    """(127 / largest, largest / 127) of a row, from its parts' largest magnitudes."""
    largest = maxima[0]
    for other in maxima[1:]:
        largest = jnp.maximum(largest, other)
    inverse = jnp.where(largest > 0, 127.0 / jnp.where(largest > 0, largest, 1.0), 0.0)
    inverse = jnp.where(inverse > MAX_INVERSE, 0.0, inverse)
    return inverse, largest * jnp.float32(1 / 127)


def _to_int8(value: Any, inverse: Any) -> Any:
    """A part of a row in [-127, 127], as int32."""
    q = jnp.maximum(jnp.minimum(value * inverse, 127.0), -127.0)
    return lax.bitcast_convert_type(q + ROUNDER, jnp.int32) - ROUNDER_BITS
