"""The ternary product of many rows on Hopper's tensor cores, straight from packed codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.mosaic_api import (
    pl,
    plgpu,
    product_kernel,
    spare_operands,
    store_transposed,
    tiled,
    whole,
    whole_tiles,
)
from pallas_kernels.mosaic_epilogue import Window, activated, add_residual, scaled
from pallas_kernels.mosaic_pipeline import (
    COMPUTE,
    COMPUTE_REGISTERS,
    Plan,
    Refs,
    add_branch,
    copy_ahead,
    grouped_sums,
    sums,
)
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES
from pallas_kernels.tiles import CODE, LOW_RANK, SIGN, Tile, fit_store


def product(
    x: Float[Array, "M K"] | Int8[Array, "M K"],
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    out_dtype: Any,
    tile: Tile,
    multiprocessors: int,
    gelu: bool = False,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """`residual + gate * gelu(x @ (scale * weight).T * token_scale + bias + u @ v.T)`.

    Of that, what is given.

    Args:
      x: (M, K) int8 or bfloat16.
      packed: (N, Kp).
      operands: `scale` is needed; `row_sum` where the weight is decoded to codes (`decodes_to`); u
        and v only with a tile that has room for them (`tiles.low_rank_stages`).
      out_dtype: of the result.
      tile: how the product is cut up.
      multiprocessors: how many blocks of threads share the tiles out.
      gelu: GELU in its tanh form, before the gate.
      interpret: None on a GPU, else the parameters of Pallas' GPU interpret mode.

    Returns:
      (M, N).
    """
    asked_m, asked_n = x.shape[0], packed.shape[0]
    native, grouped = interpret is None, operands.scale.ndim == 2
    outputs = COMPUTE * tile.rows
    x = whole_tiles(x, BLOCK_BYTES, None if native else (tile.tokens, BLOCK_CODES))
    packed = whole_tiles(packed, BLOCK_BYTES, None if native else (outputs, BLOCK_BYTES))
    if operands.u is not None:
        operands = operands._replace(
            u=whole_tiles(operands.u, LOW_RANK, None if native else (tile.tokens, LOW_RANK)),
            v=whole_tiles(operands.v, LOW_RANK, None if native else (outputs, LOW_RANK)),
        )
    plan = Plan(
        tile=tile,
        decode=decodes_to(tile, x.dtype, grouped),
        store=fit_store(tile, out_dtype),
        m_tiles=pl.cdiv(x.shape[0], tile.tokens),
        n_tiles=pl.cdiv(asked_n, outputs),
        blocks=packed.shape[1] // BLOCK_BYTES,
        multiprocessors=multiprocessors,
        x_dtype=x.dtype,
        out_dtype=out_dtype,
        grouped=grouped,
        gelu=gelu,
        branch=0 if operands.u is None else operands.u.shape[1] // LOW_RANK,
        run=operands.run(asked_m),
        native=native,
    )
    operands = operands.padded(plan.m_tiles * tile.tokens, plan.n_tiles * outputs)
    y_columns = whole(asked_n, 128 // jnp.dtype(out_dtype).itemsize) if native else len(packed)
    call = product_kernel(
        lambda *refs: _body(plan, operands, refs),
        out_type=jax.ShapeDtypeStruct((x.shape[0], y_columns), out_dtype),
        grid=(multiprocessors,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        scratch_types=_scratch(plan),
        interpret=interpret,
    )
    return call(x, packed, *operands.given())[:asked_m, :asked_n]


def decodes_to(tile: Tile, x_dtype: Any, grouped: bool) -> str:
    """The tile's decoding, or `SIGN` for `CODE`: codes need sums of integers over all of K."""
    if tile.decode == CODE and (x_dtype != jnp.int8 or grouped):
        return SIGN
    return tile.decode


def _scratch(plan: Plan) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs` from `x_smem` on."""
    tile = plan.tile
    swizzle = BLOCK_BYTES * jnp.dtype(plan.x_dtype).itemsize
    if plan.branch:
        stage = tile.tokens * plan.columns * jnp.dtype(plan.x_dtype).itemsize
        assert stage == plan.branch_rows * LOW_RANK * jnp.dtype(jnp.bfloat16).itemsize
        # Where an array that is swizzled may begin.
        assert stage % 1024 == 0
    views = [tiled(tile.tokens, plan.columns, plan.x_dtype, swizzle, (tile.stages,))]
    if plan.branch:
        views.append(tiled(plan.branch_rows, LOW_RANK, jnp.bfloat16, 128, (tile.stages,)))
    # Stages are of one size in either view, each of which begins where the other does: a slot is a
    # slot, whatever is in it.
    scratch = [
        *([plgpu.RefUnion(*views)] if plan.branch and plan.native else views),
        tiled(plan.outputs, BLOCK_BYTES, jnp.uint8, BLOCK_BYTES, (tile.code_stages,)),
        tiled(plan.store, tile.rows, plan.out_dtype, 128, (COMPUTE, 2)),
        plgpu.Barrier(num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages),
        plgpu.Barrier(num_barriers=tile.code_stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.code_stages),
    ]
    if not plan.native:
        scratch += spare_operands(COMPUTE, tile.rows, BLOCK_BYTES, tile.tokens, plan.x_dtype)
    return scratch


def _body(plan: Plan, operands: Operands, references: tuple[Any, ...]) -> None:
    """The kernel: what one warpgroup of one block does."""
    x, packed, *rest = references
    given = operands.take(rest)
    y = rest.pop(0)
    views = [rest.pop(0)]
    if not plan.branch:
        views.append(None)
    elif plan.native:
        views = list(views[0])
    else:
        views.append(rest.pop(0))
    refs = Refs(x, packed, given, y, *views, *rest[:6], spare=tuple(rest[6:]))
    block, group = lax.axis_index("block"), lax.axis_index("group")
    total = plan.m_tiles * plan.n_tiles
    mine = lax.div(total - block + plan.multiprocessors - 1, plan.multiprocessors)

    def compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        @pl.loop(0, mine)
        def _(index):
            mi, ni = plan.place(block, index)
            window = Window(
                output=ni * plan.outputs + group * plan.tile.rows,
                token=mi * plan.tile.tokens,
                shape=plan.shape,
                run=plan.run,
                native=plan.native,
            )
            if plan.grouped:
                y = grouped_sums(plan, refs, group, index, window)
            else:
                y = sums(plan, refs, group, index)
            y = scaled(y, given, window, scale_done=plan.grouped)
            if plan.branch:
                y = add_branch(plan, refs, group, index, y)
            y = activated(y, given, window, gelu=plan.gelu)
            _store(plan, refs, group, y, window)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(group == COMPUTE, lambda: copy_ahead(plan, refs, block, mine), compute)


def _store(plan: Plan, refs: Refs, group: Any, y: Any, window: Window) -> None:
    """Adds the residual, rounds and writes, some tokens at a time, through two buffers in turn."""
    outputs = pl.ds(window.output, plan.tile.rows)
    for part in range(plan.tile.tokens // plan.store):
        start = part * plan.store
        here = window._replace(token=window.token + start, shape=(plan.tile.rows, plan.store))
        some = y[:, start : start + plan.store]
        some = add_residual(some, refs.operands.residual, here).astype(plan.out_dtype)
        target = refs.y_smem.at[group, part % 2]
        # A tile begins with the first buffer, which the tile before may have ended with.
        plgpu.wait_smem_to_gmem(min(part, 1), wait_read_only=True)
        store_transposed(target, some, plan.native)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(target, refs.y.at[pl.ds(here.token, plan.store), outputs])
