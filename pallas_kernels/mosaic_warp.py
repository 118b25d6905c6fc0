"""What a warp does for a product of a few rows, below Pallas: loads, decoding and tensor cores.

A lane reads 16 packed bytes of a row at once, and the activations that belong to their 64 codes.
The tensor cores' operands are then made of what the lane itself has: which inputs share an
instruction does not matter, as long as both operands agree. So nothing moves between lanes, and no
warp waits for another before its sums are done, but for activations that a thread block shares. The
codes of several blocks of inputs are on their way at once, through places in shared memory that are
a lane's own.

Pallas offers none of this, so it is written for the level below (`inline_mgpu`), which its
interpret mode does not run: there, `mosaic_direct` does the same in plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.mosaic_api import plgpu
from pallas_kernels.mosaic_decode import mlir
from pallas_kernels.mosaic_epilogue import LAYOUT
from pallas_kernels.mosaic_lane import Lane, first_output
from pallas_kernels.mosaic_mma import HEIGHT, WIDTH, Shape
from pallas_kernels.tiles import SHARED

# Outputs that a warpgroup finishes.
PART = 64


class Scratch(NamedTuple):
    """Shared memory of a thread block.

    Attributes:
      codes: (stages, warps, 64 * rows) uint8.
      sums: (shares, tile, 8 * columns) int32 or float32.
      activations: (tokens, `shared_row`) uint8, if they are shared; else of any size.
    """

    codes: Any
    sums: Any
    activations: Any


def write_partial_sums(x: Any, packed: Any, scratch: Scratch, shape: Shape) -> None:
    """Each warp's sums over its share of the inputs; of bfloat16 too large (`unscaled`).

    Args:
      x: (tokens, 256 * blocks) in global memory, C order.
      packed: (outputs, 64 * blocks) likewise; `first_output` says which of them are meant.
      scratch: in shared memory. Each warp writes its own sums.
    """
    refs = [x, packed, *scratch]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def run(_: Any, x: Any, packed: Any, *scratch: Any) -> None:
        _Warp(shape).run(x, packed, Scratch(*scratch))

    run(*refs)  # pyright: ignore[reportCallIssue]


def write_result(y: Any, value: Any, shape: Shape) -> None:
    """Writes a warpgroup's part of the result.

    Args:
      y: (tokens, outputs) in global memory, C order.
      value: (64, tokens or more) in the accumulators' layout: the warpgroup's `PART` of the tile.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT))
    def write(_: Any, y: Any, value: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        ir, arith, llvm = mlir("ir", "arith", "llvm")
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        bits = utils.bitwidth(value.mlir_dtype)
        whole = ir.IntegerType.get_signless(bits)
        start = utils.memref_ptr(y)
        letter = {16: "h", 32: "r"}[bits]
        group = arith.divui(utils.thread_idx(), utils.c(128, i32))
        part = arith.muli(group, utils.c(PART, i32))
        part = arith.minui(part, utils.c(shape.tile - PART, i32))
        first = arith.addi(first_output(shape), part)

        def one(element: Any, at: tuple[Any, Any]) -> None:
            row, token = (arith.index_cast(i32, index) for index in at)
            row = arith.addi(row, first)
            inside = arith.cmpi(arith.CmpIPredicate.slt, token, utils.c(shape.tokens, i32))
            wide = arith.muli(arith.extui(i64, token), utils.c(shape.outputs, i64))
            index = arith.addi(wide, arith.extui(i64, row))
            address = arith.addi(
                llvm.ptrtoint(i64, start), arith.muli(index, utils.c(bits // 8, i64))
            )
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [arith.extui(i32, inside), address, utils.bitcast(element, whole)],
                f"{{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.b{bits} [$1], $2; }}",
                f"r,l,{letter}",
                has_side_effects=True,
            )

        value.foreach(one)

    write(y, value)  # pyright: ignore[reportCallIssue]


def per_token(values: Any, tokens: int, layout: Any) -> Any:
    """A vector of the tokens in a layout, without reading past its end.

    Args:
      values: (tokens,) float32 in global memory.
      tokens: 1 to 16.
      layout: of the result.

    Returns:
      (8,) or (16,); what is past the end is the last one's.
    """
    from jax.experimental.mosaic import gpu as mgpu

    width = WIDTH * -(-tokens // WIDTH)
    shape = plgpu.ShapeDtypeStruct((width,), values.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=shape)
    def take(_: Any, values: Any) -> Any:
        from jax.experimental.mosaic.gpu import utils

        ir, arith, memref = mlir("ir", "arith", "memref")
        last = utils.c(tokens - 1, ir.IndexType.get())
        start = utils.c(0.0, ir.F32Type.get())
        empty = mgpu.FragmentedArray.splat(start, (width,), layout.to_mgpu())

        def one(_: Any, at: tuple[Any, ...]) -> Any:
            return memref.load(values, [arith.minui(at[0], last)])

        return empty.foreach(one, create_array=True)

    return take(values)  # pyright: ignore[reportCallIssue]


class _Warp(Lane):
    """Emits the program of one lane."""

    def run(self, x: Any, packed: Any, scratch: Scratch) -> None:
        """The whole of it."""
        shape, arith = self.shape, self.arith
        fetch, take = self.ring(packed, scratch.codes)
        read, of_plane = self.reader(x), self.shared_reader(scratch.activations)
        count = 4 * shape.columns * (shape.sets * shape.tiles + int(shape.exact))
        zero = self.utils.c(0 if shape.exact else 0.0, self.sum_type)
        early, shared = shape.reads_ahead, shape.activations == SHARED

        def block(step: Any) -> Any:
            return arith.addi(self.share, arith.muli(step, self.word(shape.shares)))

        # Activations before codes, of which there are more: what is asked for first comes first.
        first = read(block(self.word(0))) if early else []
        if shared:
            self.share_activations(x, scratch.activations)
        for step in range(shape.stages):
            fetch(block(self.word(step)), self.word(step))
        if shared:
            self.wait(shape.stages)
            self.asm([], [], "barrier.sync 0;", stays=True)

        def multiply(step: Any, carried: list[Any]) -> list[Any]:
            now, then = carried[count:], []
            if early:
                then = read(block(arith.addi(step, self.word(1))))
            elif not shared:
                now = read(block(step))

            def activations(plane: int) -> list[Any]:
                if shared:
                    return of_plane(block(step), plane)
                return now[plane * shape.plane_words : (plane + 1) * shape.plane_words]

            slot = arith.remui(step, self.word(shape.stages))
            sums = self.multiply(take(slot), activations, carried[:count])
            # The slot is read: what was in it has been multiplied.
            fetch(block(arith.addi(step, self.word(shape.stages))), slot)
            return [*sums, *then]

        mine = arith.subi(self.word(shape.blocks + shape.shares - 1), self.share)
        trips = arith.divui(mine, self.word(shape.shares))
        sums = self.loop(trips, [*[zero] * count, *first], multiply)
        self.write(scratch.sums, self.joined(sums[:count]))

    def loop(
        self, trips: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """What is carried after `body(step, carried)` for each step."""
        index, scf = self.ir.IndexType.get(), self.scf
        start, step = (self.utils.c(value, index) for value in (0, 1))
        loop = scf.ForOp(start, self.arith.index_cast(index, trips), step, carried)
        with self.ir.InsertionPoint(loop.body):
            at = self.arith.index_cast(self.i32, loop.induction_variable)
            scf.yield_(body(at, list(loop.inner_iter_args)))
        return list(loop.results)

    def write(self, place: Any, sums: list[Any]) -> None:
        """A warp's sums to its part of shared memory."""
        arith, llvm, columns = self.arith, self.llvm, self.shape.columns
        width = WIDTH * columns
        row = arith.addi(arith.muli(self.share, self.word(self.shape.tile)), self.first)
        row = arith.addi(row, self.row)
        lane = arith.addi(arith.muli(row, self.word(width)), arith.muli(self.quarter, self.word(2)))
        start = self.utils.memref_ptr(place)
        for tile in range(self.shape.tiles):
            for column in range(columns):
                for value in range(4):
                    # Of rows `lane / 4` and that plus 8, two neighbouring tokens each.
                    half, token = divmod(value, 2)
                    at = (HEIGHT * tile + WIDTH * half) * width + WIDTH * column + token
                    index = arith.addi(lane, self.word(at))
                    pointer = self.utils.getelementptr(start, [index], self.sum_type)
                    llvm.store(sums[4 * (tile * columns + column) + value], pointer)
