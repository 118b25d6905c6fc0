"""The loops of the many-rows kernel on Hopper: who copies what when, and who multiplies.

    warpgroup   what it does
    0, 1        multiply: each decodes its own outputs' codes in registers (operand A) and takes the
                tile's activations from shared memory (operand B)
    2           copies packed codes and activations to shared memory, ahead of the others

A low-rank branch comes after a tile's activations, through the same stages.

A block works through its tiles one after the other, and the copying does not stop between them:
stages are counted through.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_api import accumulator, multiply, multiply_onto, pl, plgpu, read
from pallas_kernels.mosaic_decode import decode_plane, packed_layout, unscaled
from pallas_kernels.mosaic_epilogue import LAYOUT, Window
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES
from pallas_kernels.tiles import LOW_RANK, Tile, low_rank_rows, low_rank_stages

# Warpgroups that multiply; one more copies.
COMPUTE = 2
# Registers a thread: 65,536 for three warpgroups.
MEMORY_REGISTERS = 40
COMPUTE_REGISTERS = 232


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed when a kernel is built.

    Attributes:
      tile: how the product is cut up.
      decode: `CODE`, `SIGN` or `TOP`.
      store: tokens that are written at once.
      m_tiles, n_tiles: how many tiles there are.
      blocks: of 256 inputs.
      multiprocessors: blocks of threads that share the tiles out.
      x_dtype, out_dtype: of activations and result.
      grouped: whether the weight has a scale per group.
      gelu: whether the result goes through GELU.
      branch: of a low-rank branch, how many times 64 columns.
      run: tokens that share a gate.
      native: for a GPU, not for interpret mode.
    """

    tile: Tile
    decode: str
    store: int
    m_tiles: int
    n_tiles: int
    blocks: int
    multiprocessors: int
    x_dtype: Any
    out_dtype: Any
    grouped: bool
    gelu: bool
    branch: int
    run: int
    native: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, tokens) of a warpgroup."""
        return self.tile.rows, self.tile.tokens

    @property
    def outputs(self) -> int:
        """A tile's outputs, those of both warpgroups."""
        return COMPUTE * self.tile.rows

    @property
    def parts(self) -> int:
        """Stages of activations for one of codes."""
        return 4 // self.tile.planes

    @property
    def columns(self) -> int:
        """Inputs in a stage of activations."""
        return self.tile.planes * BLOCK_BYTES

    @property
    def branch_rows(self) -> int:
        """Rows of 64 columns of a low-rank branch that fill a stage of activations."""
        return low_rank_rows(self.tile, 8 * jnp.dtype(self.x_dtype).itemsize)

    @property
    def branch_stages(self) -> int:
        """Stages of a low-rank branch's 64 columns: of the tokens, then of the outputs."""
        return low_rank_stages(self.tile, 8 * jnp.dtype(self.x_dtype).itemsize)

    @property
    def inputs(self) -> int:
        """Stages of activations in a tile."""
        return self.blocks * self.parts

    @property
    def ring(self) -> int:
        """Stages in a tile, those of a low-rank branch included."""
        return self.inputs + self.branch * self.branch_stages

    @property
    def sum_dtype(self) -> Any:
        """The accumulators' type."""
        return jnp.int32 if self.x_dtype == jnp.int8 else jnp.float32

    def place(self, block: Any, index: Any) -> tuple[Any, Any]:
        """(tokens, outputs), counted in tiles, of a block's `index`-th tile."""
        tiles = (self.m_tiles, self.n_tiles)
        linear = block + index * self.multiprocessors
        return plgpu.planar_snake(linear, tiles, int(self.tile.along_n), self.tile.band)


class Refs(NamedTuple):
    """What a kernel reads and writes; `_full` and `_empty` are the barriers of a ring of stages.

    `branch_smem` is `x_smem`, seen as rows of a low-rank branch; None without one.
    """

    x: Any
    packed: Any
    operands: Operands
    y: Any
    x_smem: Any
    branch_smem: Any
    code_smem: Any
    y_smem: Any
    x_full: Any
    x_empty: Any
    code_full: Any
    code_empty: Any
    spare: tuple[Any, ...]


def copy_ahead(plan: Plan, refs: Refs, block: Any, mine: Any) -> None:
    """All that the third warpgroup does: `mine` tiles' codes and activations to shared memory."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    tile = plan.tile

    def claim(empty: Any, count: Any, stages: int) -> Any:
        """The slot of a stage, once nobody reads what was in it."""
        slot = lax.rem(count, stages)

        @pl.when(count >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        return slot

    def copy_branch(start: Any, tokens: Any, first_output: Any) -> None:
        halves = plan.branch_stages - 1
        size = plan.outputs // halves
        rows = [(refs.operands.u, tokens, tile.tokens)]
        for half in range(halves):
            rows.append((refs.operands.v, pl.ds(first_output + half * size, size), size))
        for index in range(plan.branch * len(rows)):
            ref, some, many = rows[index % len(rows)]
            slot = claim(refs.x_empty, start + index, tile.stages)
            source = ref.at[some, pl.ds(index // len(rows) * LOW_RANK, LOW_RANK)]
            target = refs.branch_smem.at[slot, pl.ds(0, many)]
            plgpu.copy_gmem_to_smem(source, target, refs.x_full.at[slot])

    def drain(empty: Any, count: Any, stages: int) -> None:
        # A barrier must not be left with an arrival that nobody waited for.
        @pl.loop(0, lax.min(count, stages))
        def _(index):
            plgpu.barrier_wait(empty.at[lax.rem(lax.max(count - stages, 0) + index, stages)])

    @pl.loop(0, mine)
    def _(index):
        mi, ni = plan.place(block, index)
        outputs = pl.ds(ni * plan.outputs, plan.outputs)
        tokens = pl.ds(mi * tile.tokens, tile.tokens)

        @pl.loop(0, plan.blocks)
        def _(step):
            slot = claim(refs.code_empty, index * plan.blocks + step, tile.code_stages)
            source = refs.packed.at[outputs, pl.ds(step * BLOCK_BYTES, BLOCK_BYTES)]
            plgpu.copy_gmem_to_smem(source, refs.code_smem.at[slot], refs.code_full.at[slot])
            for part in range(plan.parts):
                stage = index * plan.ring + step * plan.parts + part
                slot = claim(refs.x_empty, stage, tile.stages)
                columns = pl.ds(step * BLOCK_CODES + part * plan.columns, plan.columns)
                source = refs.x.at[tokens, columns]
                plgpu.copy_gmem_to_smem(source, refs.x_smem.at[slot], refs.x_full.at[slot])

        if plan.branch:
            copy_branch(index * plan.ring + plan.inputs, tokens, ni * plan.outputs)

    drain(refs.code_empty, mine * plan.blocks, tile.code_stages)
    drain(refs.x_empty, mine * plan.ring, tile.stages)


def load_codes(plan: Plan, refs: Refs, group: Any, count: Any) -> Any:
    """(rows, 64) packed bytes of this warpgroup in registers; their stage is free again."""
    slot = lax.rem(count, plan.tile.code_stages)
    plgpu.barrier_wait(refs.code_full.at[slot])
    outputs = pl.ds(pl.multiple_of(group * plan.tile.rows, plan.tile.rows), plan.tile.rows)
    codes = read(refs.code_smem.at[slot, outputs], packed_layout(plan.x_dtype), plan.native)
    plgpu.barrier_arrive(refs.code_empty.at[slot])
    return codes


def sums(plan: Plan, refs: Refs, group: Any, index: Any) -> Any:
    """(outputs, tokens): all of K without a break."""
    tile, spare = plan.tile, [buffer.at[group] for buffer in refs.spare]
    first = index * plan.ring
    last = first + plan.inputs - 1

    def release(stage: Any) -> None:
        plgpu.barrier_arrive(refs.x_empty.at[lax.rem(stage, tile.stages)])

    def run(acc: Any) -> Any:
        @pl.loop(0, plan.blocks)
        def _(step):
            codes = load_codes(plan, refs, group, index * plan.blocks + step)
            for part in range(plan.parts):
                stage = first + step * plan.parts + part
                slot = lax.rem(stage, tile.stages)
                plgpu.barrier_wait(refs.x_full.at[slot])
                for p in range(tile.planes):
                    plane = part * tile.planes + p
                    a = decode_plane(codes, plane, plan.x_dtype, plan.decode, plan.native)
                    b = refs.x_smem.at[slot, :, pl.ds(p * BLOCK_BYTES, BLOCK_BYTES)]
                    multiply(acc, a, b, spare)
                    if tile.flight is not None:
                        plgpu.wgmma_wait(tile.flight)
                if tile.lag:
                    # The stage before this one has been multiplied; this one may still be.
                    plgpu.wgmma_wait(tile.planes)
                    pl.when(stage > first)(lambda stage=stage: release(stage - 1))
                else:
                    plgpu.wgmma_wait(0)
                    release(stage)

        if tile.lag:
            plgpu.wgmma_wait(0)
            release(last)
        return unscaled(acc[...], plan.decode, plan.native)

    return pl.run_scoped(run, accumulator(plan.shape, plan.sum_dtype))


def grouped_sums(plan: Plan, refs: Refs, group: Any, index: Any, window: Window) -> Any:
    """(outputs, tokens) float32, scaled: two planes are a group, whose sum is scaled at once."""
    tile, spare = plan.tile, [buffer.at[group] for buffer in refs.spare]
    outputs = pl.ds(window.output, tile.rows)

    def group_sum(codes: Any, slot: Any, part: int, half: int) -> Any:
        def run(acc: Any) -> Any:
            for p in (2 * half, 2 * half + 1):
                plane = part * tile.planes + p
                a = decode_plane(codes, plane, plan.x_dtype, plan.decode, plan.native)
                b = refs.x_smem.at[slot, :, pl.ds(p * BLOCK_BYTES, BLOCK_BYTES)]
                multiply(acc, a, b, spare)
            return unscaled(acc[...], plan.decode, plan.native)

        return pl.run_scoped(run, accumulator(plan.shape, plan.sum_dtype)).astype(jnp.float32)

    def block(step: Any, y: Any) -> Any:
        codes = load_codes(plan, refs, group, index * plan.blocks + step)
        for part in range(plan.parts):
            slot = lax.rem(index * plan.ring + step * plan.parts + part, tile.stages)
            plgpu.barrier_wait(refs.x_full.at[slot])
            for half in range(tile.planes // 2):
                g = step * 2 + part * (tile.planes // 2) + half
                scale = read(refs.operands.scale.at[g, outputs], LAYOUT.reduce(1), plan.native)
                scale = scale.astype(jnp.float32)
                wide = window.cast(lax.broadcast_in_dim(scale, plan.shape, (0,)))
                y = y + group_sum(codes, slot, part, half) * wide
            plgpu.barrier_arrive(refs.x_empty.at[slot])
        return y

    start = window.cast(jnp.zeros(plan.shape, jnp.float32))
    return jax.lax.fori_loop(0, plan.blocks, block, start)


def add_branch(plan: Plan, refs: Refs, group: Any, index: Any, y: Any) -> Any:
    """`y` (outputs, tokens) float32, and what the low-rank branch adds to it."""
    tile, halves = plan.tile, plan.branch_stages - 1
    first = index * plan.ring + plan.inputs
    for start in range(0, plan.branch * plan.branch_stages, plan.branch_stages):
        slots = [lax.rem(first + start + i, tile.stages) for i in range(plan.branch_stages)]
        for slot in slots:
            plgpu.barrier_wait(refs.x_full.at[slot])
        if halves == 1:
            mine, row = slots[1], pl.multiple_of(group * tile.rows, tile.rows)
        else:
            mine, row = lax.rem(first + start + 1 + group, tile.stages), 0
        v = refs.branch_smem.at[mine, pl.ds(row, tile.rows)]
        u = refs.branch_smem.at[slots[0], pl.ds(0, tile.tokens)]
        y = multiply_onto(y, v, u, plan.native)
        for slot in slots:
            plgpu.barrier_arrive(refs.x_empty.at[slot])
    return y
