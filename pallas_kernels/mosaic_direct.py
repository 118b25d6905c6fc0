"""The ternary product of up to 16 rows on Hopper: every lane multiplies what it has read itself.

A block of threads has a tile of outputs. Its warps share them and the inputs out, and then each
warpgroup adds up what all have summed for 64 outputs, in a fixed order, so that results repeat. A
last tile that would reach past the end begins earlier instead: what two blocks write is the same.
What a warp does is in `mosaic_warp`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.mosaic_api import pl, plgpu, product_kernel, read
from pallas_kernels.mosaic_decode import decode_plane, unscaled
from pallas_kernels.mosaic_epilogue import (
    LAYOUT,
    Window,
    activated,
    add_residual,
    scaled,
)
from pallas_kernels.mosaic_mma import PLANES, WIDTH, Shape
from pallas_kernels.mosaic_warp import (
    PART,
    Scratch,
    per_token,
    write_partial_sums,
    write_result,
)
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES
from pallas_kernels.tiles import SHARED, TOP, DirectTile, shared_row

# Of a warpgroup.
WARPS = 4


def product_direct(
    x: Float[Array, "M K"] | Int8[Array, "M K"],
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    out_dtype: Any,
    tile: DirectTile,
    gelu: bool = False,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """As `mosaic_matmul.product`, for M up to 16; scales per output, and `row_sum` is not used."""
    (tokens, columns), (outputs, width) = x.shape, packed.shape
    native, exact = interpret is None, x.dtype == jnp.int8
    blocks = width // BLOCK_BYTES
    shape = Shape(
        tokens=tokens,
        outputs=max(outputs, tile.outputs),
        tile=tile.outputs,
        blocks=blocks,
        warps=WARPS * tile.groups,
        rows=tile.rows,
        stages=min(tile.stages, pl.cdiv(blocks, tile.shares)),
        activations=tile.activations,
        exact=exact,
    )
    size = (PART, WIDTH * shape.columns)
    # Rows of whole blocks. Pallas' interpreter reads whole tiles, and wants them to be there.
    rows = (0, 0) if native else (0, size[1] - tokens)
    if columns < 4 * width or rows[1]:
        x = jnp.pad(x, (rows, (0, 4 * width - columns)))
    if outputs < shape.outputs:
        packed = jnp.pad(packed, ((0, shape.outputs - outputs), (0, 0)))
    run = operands.run(tokens)
    token_scale = operands.token_scale
    operands = operands._replace(row_sum=None).padded(size[1], shape.outputs)
    if native:
        # Padding it would be a kernel of its own, which takes as long as all of this.
        operands = operands._replace(token_scale=token_scale)

    def body(x_gmem, packed_gmem, *rest):
        rest = list(rest)
        given = operands.take(rest)
        y_gmem, *scratch, done = rest
        scratch = Scratch(*scratch)
        group = lax.axis_index("group")
        first = jnp.minimum(lax.axis_index("tiles") * shape.tile, shape.outputs - shape.tile)
        # A warpgroup finishes so many of the tile's outputs; some of the last two have the same.
        part = jnp.minimum(group * PART, shape.tile - PART)
        window = Window(output=first + part, token=0, shape=size, run=run, native=native)
        if native:
            ready = window.ahead(given._replace(token_scale=None))
            if given.token_scale is not None:
                vector = per_token(given.token_scale, tokens, LAYOUT.reduce(0))
                ready = ready._replace(token_scale=vector)
            write_partial_sums(x_gmem, packed_gmem, scratch, shape)
        else:
            ready = window.ahead(given)
            _sum_in_jax(x_gmem, packed_gmem, scratch.sums, group, first, shape)
        # Of all warps of the group, before any of them reads.
        plgpu.commit_smem()
        if tile.groups > 1:
            plgpu.barrier_arrive(done)

        @pl.when(group * PART < shape.tile)
        def _():
            if tile.groups > 1:
                plgpu.barrier_wait(done)
            mine = pl.ds(part, PART)
            total = read(scratch.sums.at[0, mine], LAYOUT, native)
            for share in range(1, shape.shares):
                total = total + read(scratch.sums.at[share, mine], LAYOUT, native)
            if not exact:
                total = unscaled(total, TOP, native)
            total = scaled(total, given, window, scale_done=False, ready=ready)
            total = activated(total, given, window, gelu=gelu)
            total = add_residual(total, given.residual, window).astype(out_dtype)
            if native:
                write_result(y_gmem, total, shape)
            else:
                y_gmem[:, pl.ds(window.output, PART)] = total.T

    y_shape = (tokens if native else size[1], shape.outputs)
    call = product_kernel(
        body,
        out_type=jax.ShapeDtypeStruct(y_shape, out_dtype),
        grid=(pl.cdiv(shape.outputs, shape.tile),),
        grid_names=("tiles",),
        num_threads=tile.groups,
        scratch_types=[
            *scratch_types(shape),
            plgpu.Barrier(num_arrivals=tile.groups),
        ],
        interpret=interpret,
    )
    return call(x, packed, *operands.given())[:tokens, :outputs]


def scratch_types(shape: Shape) -> Scratch:
    """The shared memory of a thread block."""
    shared = (shape.tokens, shared_row(BLOCK_CODES * shape.blocks, shape.size))
    return Scratch(
        codes=plgpu.SMEM((shape.stages, shape.warps, BLOCK_BYTES * shape.rows), jnp.uint8),
        sums=plgpu.SMEM(
            (shape.shares, shape.tile, WIDTH * shape.columns),
            jnp.int32 if shape.exact else jnp.float32,
        ),
        activations=plgpu.SMEM(shared if shape.activations == SHARED else (1, 16), jnp.uint8),
    )


def _sum_in_jax(x: Any, packed: Any, sums: Any, group: Any, first: Any, shape: Shape) -> None:
    """`write_partial_sums` for interpret mode: the same shares, one after the other."""
    for own in range(WARPS):
        warp, parts = group * WARPS + own, shape.tile // shape.rows
        share = lax.div(warp, parts)
        row = lax.rem(warp, parts) * shape.rows
        mine = pl.ds(row, shape.rows)
        sums[share, mine] = jnp.zeros((shape.rows, sums.shape[2]), sums.dtype)

        @pl.loop(0, lax.div(shape.blocks - share + shape.shares - 1, shape.shares))
        def _(step):
            block = share + step * shape.shares  # noqa: B023  (the loop's body is traced at once)
            rows = pl.ds(first + row, shape.rows)  # noqa: B023
            codes = packed[rows, pl.ds(block * BLOCK_BYTES, BLOCK_BYTES)]
            for plane in range(PLANES):
                at = pl.ds(block * BLOCK_CODES + plane * BLOCK_BYTES, BLOCK_BYTES)
                signs = decode_plane(codes, plane, x.dtype, TOP, native=False)
                sums[share, mine] += lax.dot_general(  # noqa: B023
                    signs, x[:, at], (((1,), (1,)), ((), ())), preferred_element_type=sums.dtype
                )
