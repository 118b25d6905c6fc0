"""The ternary product of up to 16 rows on Hopper: every lane multiplies what it has read itself.

A block of threads has 64 outputs. Its warps share them and the inputs out, and the first four add
up what all have summed, in a fixed order, so that results repeat. What a warp does is in
`mosaic_warp`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.mosaic_api import pl, plgpu, product_kernel, read
from pallas_kernels.mosaic_decode import decode_plane, unscaled
from pallas_kernels.mosaic_epilogue import LAYOUT, Operands, Window, add_residual, scaled
from pallas_kernels.mosaic_mma import PLANES, ROWS, WIDTH, Shape
from pallas_kernels.mosaic_warp import per_token, write_partial_sums, write_result
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES
from pallas_kernels.tiles import TOP, DirectTile

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
    # As many warps as have something to do; and as much under way as there is.
    alone = WARPS * tile.rows // ROWS
    groups = min(tile.groups, -(-blocks // alone))
    stages = min(tile.stages, -(-blocks // (alone * groups)))
    shape = Shape(
        tokens=tokens,
        outputs=outputs,
        blocks=blocks,
        warps=WARPS * groups,
        rows=tile.rows,
        stages=stages,
        activations=tile.activations,
        exact=exact,
    )
    size = (ROWS, WIDTH * shape.columns)
    n_tiles = pl.cdiv(outputs, ROWS)
    # Rows of whole blocks. Pallas' interpreter reads whole tiles, and wants them to be there.
    rows = (0, 0) if native else (0, size[1] - tokens)
    if columns < 4 * width or rows[1]:
        x = jnp.pad(x, (rows, (0, 4 * width - columns)))
    if not native:
        packed = jnp.pad(packed, ((0, n_tiles * ROWS - outputs), (0, 0)))
    run = operands.run(tokens)
    token_scale = operands.token_scale
    operands = operands._replace(row_sum=None).padded(size[1], n_tiles * ROWS)
    if native:
        # Padding it would be a kernel of its own, which takes as long as all of this.
        operands = operands._replace(token_scale=token_scale)

    def body(x_gmem, packed_gmem, *rest):
        rest = list(rest)
        given = operands.take(rest)
        y_gmem, code_smem, part_smem, done = rest
        group = lax.axis_index("group")
        output = lax.axis_index("outputs") * ROWS
        window = Window(output=output, token=0, shape=size, run=run, native=native)
        if native:
            ready = window.ahead(given._replace(token_scale=None))
            if given.token_scale is not None:
                vector = per_token(given.token_scale, tokens, LAYOUT.reduce(0))
                ready = ready._replace(token_scale=vector)
            write_partial_sums(x_gmem, packed_gmem, code_smem, part_smem, shape)
        else:
            ready = window.ahead(given)
            _sum_in_jax(x_gmem, packed_gmem, part_smem, group, window.output, shape)

        def finish():
            if groups > 1:
                plgpu.barrier_wait(done)
            total = read(part_smem.at[0], LAYOUT, native)
            for share in range(1, shape.shares):
                total = total + read(part_smem.at[share], LAYOUT, native)
            if not exact:
                total = unscaled(total, TOP, native)
            total = scaled(total, given, window, gelu=gelu, scale_done=False, ready=ready)
            total = add_residual(total, given.residual, window).astype(out_dtype)
            if native:
                write_result(y_gmem, total, tokens, outputs)
            else:
                y_gmem[:, pl.ds(window.output, ROWS)] = total.T

        # Of all warps of the group, before any of them reads.
        plgpu.commit_smem()
        pl.when(group != 0)(lambda: plgpu.barrier_arrive(done))
        pl.when(group == 0)(finish)

    y_shape = (tokens, outputs) if native else (size[1], n_tiles * ROWS)
    call = product_kernel(
        body,
        out_type=jax.ShapeDtypeStruct(y_shape, out_dtype),
        grid=(n_tiles,),
        grid_names=("outputs",),
        num_threads=groups,
        scratch_types=[
            plgpu.SMEM((stages, shape.warps, shape.slot_bytes), jnp.uint8),
            plgpu.SMEM((shape.shares, *size), jnp.int32 if exact else jnp.float32),
            plgpu.Barrier(num_arrivals=max(groups - 1, 1)),
        ],
        interpret=interpret,
    )
    return call(x, packed, *operands.given())[:tokens, :outputs]


def _sum_in_jax(x: Any, packed: Any, parts: Any, group: Any, output: Any, shape: Shape) -> None:
    """`write_partial_sums` for interpret mode: the same shares, one after the other."""
    for own in range(WARPS):
        warp, others = group * WARPS + own, ROWS // shape.rows
        share = lax.div(warp, others)
        first = lax.rem(warp, others) * shape.rows
        mine = pl.ds(first, shape.rows)
        parts[share, mine] = jnp.zeros((shape.rows, parts.shape[2]), parts.dtype)

        @pl.loop(0, lax.div(shape.blocks - share + shape.shares - 1, shape.shares))
        def _(step):
            block = share + step * shape.shares  # noqa: B023  (the loop's body is traced at once)
            rows = pl.ds(output + first, shape.rows)  # noqa: B023
            codes = packed[rows, pl.ds(block * BLOCK_BYTES, BLOCK_BYTES)]
            for plane in range(PLANES):
                at = pl.ds(block * BLOCK_CODES + plane * BLOCK_BYTES, BLOCK_BYTES)
                signs = decode_plane(codes, plane, x.dtype, TOP, native=False)
                parts[share, mine] += lax.dot_general(  # noqa: B023
                    signs, x[:, at], (((1,), (1,)), ((), ())), preferred_element_type=parts.dtype
                )
