"""The ternary product of a few rows on Hopper: as fast as the packed codes can be read.

A block has 64 outputs. Its warpgroups share the inputs out, each with a ring of stages of its own,
and the first adds up what the others summed: in a fixed order, so that results repeat.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.mosaic_api import (
    accumulator,
    multiply,
    pl,
    plgpu,
    product_kernel,
    read,
    spare_operands,
    store_transposed,
    tiled,
    whole,
    whole_tiles,
)
from pallas_kernels.mosaic_decode import decode_plane, packed_layout, unscaled
from pallas_kernels.mosaic_epilogue import (
    LAYOUT,
    Window,
    activated,
    add_residual,
    scaled,
)
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES
from pallas_kernels.tiles import TOP, FewTile

# Outputs of a block: the height of one instruction of the tensor cores.
ROWS = 64


def product_few(
    x: Float[Array, "M K"] | Int8[Array, "M K"],
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    out_dtype: Any,
    tile: FewTile,
    gelu: bool = False,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """As `mosaic_matmul.product`; scales per output only, and `row_sum` is not used."""
    asked_m, asked_n = x.shape[0], packed.shape[0]
    native, tokens = interpret is None, tile.tokens
    x = whole_tiles(x, BLOCK_BYTES, None if native else (tokens, BLOCK_CODES))
    packed = whole_tiles(packed, BLOCK_BYTES, None if native else (ROWS, BLOCK_BYTES))
    sum_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    blocks = packed.shape[1] // BLOCK_BYTES
    groups, stages = min(tile.groups, blocks), tile.stages
    m_tiles, n_tiles = pl.cdiv(x.shape[0], tokens), pl.cdiv(asked_n, ROWS)
    shape = (ROWS, tokens)
    run = operands.run(asked_m)
    operands = operands._replace(row_sum=None).padded(m_tiles * tokens, n_tiles * ROWS)

    def body(x_gmem, packed_gmem, *rest):
        rest = list(rest)
        given = operands.take(rest)
        y_gmem, x_smem, code_smem, part_smem, y_smem, full, done, *spare = rest
        group = lax.axis_index("group")
        window = Window(
            output=lax.axis_index("outputs") * ROWS,
            token=lax.axis_index("tokens") * tokens,
            shape=shape,
            run=run,
            native=native,
        )
        at_outputs, at_tokens = pl.ds(window.output, ROWS), pl.ds(window.token, tokens)
        mine = lax.div(blocks - group + groups - 1, groups)

        def fetch(index):
            slot = lax.rem(index, stages)
            step = group + index * groups
            barrier = full.at[group * stages + slot]
            at = (at_outputs, pl.ds(step * BLOCK_BYTES, BLOCK_BYTES))
            plgpu.copy_gmem_to_smem(packed_gmem.at[at], code_smem.at[group, slot], barrier)
            at = (at_tokens, pl.ds(step * BLOCK_CODES, BLOCK_CODES))
            plgpu.copy_gmem_to_smem(x_gmem.at[at], x_smem.at[group, slot], barrier)

        def partial_sums(acc):
            @pl.loop(0, mine)
            def _(index):
                slot = lax.rem(index, stages)
                plgpu.barrier_wait(full.at[group * stages + slot])
                codes = read(code_smem.at[group, slot], packed_layout(x.dtype), native)
                for plane in range(4):
                    a = decode_plane(codes, plane, x.dtype, TOP, native)
                    b = x_smem.at[group, slot, :, pl.ds(plane * BLOCK_BYTES, BLOCK_BYTES)]
                    multiply(acc, a, b, [buffer.at[group] for buffer in spare])
                plgpu.wgmma_wait(0)

                @pl.when(index + stages < mine)
                def _():
                    # Every thread of the group is done with the slot.
                    plgpu.commit_smem()
                    fetch(index + stages)

            return unscaled(acc[...], TOP, native)

        def finish(total):
            if groups > 1:
                plgpu.barrier_wait(done)
            for other in range(groups - 1):
                total = total + read(part_smem.at[other], LAYOUT, native)
            total = scaled(total, given, window, scale_done=False)
            total = activated(total, given, window, gelu=gelu)
            total = add_residual(total, given.residual, window)
            store_transposed(y_smem, total.astype(out_dtype), native)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[at_tokens, at_outputs])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.loop(0, lax.min(mine, stages))(fetch)
        y = pl.run_scoped(partial_sums, accumulator(shape, sum_dtype))

        @pl.when(group != 0)
        def _():
            part_smem[group - 1] = y
            plgpu.commit_smem()
            plgpu.barrier_arrive(done)

        pl.when(group == 0)(lambda: finish(y))

    swizzle = BLOCK_BYTES * x.dtype.itemsize
    scratch = [
        tiled(tokens, BLOCK_CODES, x.dtype, swizzle, (groups, stages)),
        tiled(ROWS, BLOCK_BYTES, jnp.uint8, BLOCK_BYTES, (groups, stages)),
        plgpu.SMEM((max(groups - 1, 1), *shape), sum_dtype),
        tiled(tokens, ROWS, out_dtype, 128),
        plgpu.Barrier(num_arrivals=2, num_barriers=groups * stages),
        plgpu.Barrier(num_arrivals=max(groups - 1, 1)),
    ]
    if not native:
        scratch += spare_operands(groups, ROWS, BLOCK_BYTES, tokens, x.dtype)
    y_columns = whole(asked_n, 128 // jnp.dtype(out_dtype).itemsize) if native else len(packed)
    call = product_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], y_columns), out_dtype),
        grid=(n_tiles, m_tiles),
        grid_names=("outputs", "tokens"),
        num_threads=groups,
        scratch_types=scratch,
        interpret=interpret,
    )
    return call(x, packed, *operands.given())[:asked_m, :asked_n]
