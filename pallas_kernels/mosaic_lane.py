"""What a lane reads for a product of a few rows, below Pallas: codes and activations.

Codes come through places in shared memory that are a lane's own, several blocks of inputs ahead, so
that no lane waits for another's. Activations come straight into registers, or, all of them, into
shared memory that the thread block reads together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.mosaic_decode import mlir
from pallas_kernels.mosaic_mma import PLANES, READ_BYTES, WIDTH, WORDS, Multiplier, Shape
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES
from pallas_kernels.tiles import shared_row


def first_output(shape: Shape) -> Any:
    """The first output of this thread block; the last block's tile overlaps the one before."""
    from jax.experimental.mosaic.gpu import utils

    ir, arith, gpu = mlir("ir", "arith", "gpu")
    i32 = ir.IntegerType.get_signless(32)
    block = arith.index_cast(i32, gpu.block_id(gpu.Dimension.x))
    last = utils.c(shape.outputs - shape.tile, i32)
    return arith.minui(arith.muli(block, utils.c(shape.tile, i32)), last)


class Lane(Multiplier):
    """Emits what a lane reads."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.thread = self.utils.thread_idx()
        self.lane = lane = self.arith.andi(self.thread, self.word(31))
        self.warp = self.arith.shrui(self.thread, self.word(5))
        parts = self.word(shape.tile // shape.rows)
        self.share = self.arith.divui(self.warp, parts)
        # Of the tile's rows, the first of the warp's; and of each eight rows, the lane's.
        part = self.arith.remui(self.warp, parts)
        self.first = self.arith.muli(part, self.word(shape.rows))
        self.row = self.arith.shrui(lane, self.word(2))
        self.quarter = self.arith.andi(lane, self.word(3))

    def address(self, ref: Any, row: Any, stride: int, lane_bytes: int) -> Any:
        """The address of this lane's first bytes of a row, in global memory: 64 bits."""
        arith = self.arith
        at = arith.addi(
            arith.muli(arith.extui(self.i64, row), self.utils.c(stride, self.i64)),
            arith.extui(self.i64, arith.muli(self.quarter, self.word(lane_bytes))),
        )
        return arith.addi(self.llvm.ptrtoint(self.i64, self.utils.memref_ptr(ref)), at)

    def shared_address(self, ref: Any) -> Any:
        """The address of the first byte, in shared memory: 32 bits."""
        return self.llvm.ptrtoint(self.i32, self.utils.memref_ptr(ref))

    def within(self, block: Any) -> Any:
        """The block of inputs, or the last one: what is read past the end is not used."""
        return self.arith.minui(block, self.word(self.shape.blocks - 1))

    def copy(self, target: Any, source: Any, count: Any) -> None:
        """Sixteen bytes to shared memory, later; of them `count` are read, the rest is zeros."""
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        self.asm([], [target, source, count], text, stays=True)

    def wait(self, later: int) -> None:
        """For a lane's own copies, all but those of the `later` latest groups."""
        self.asm([], [], f"cp.async.wait_group {later};", stays=True)

    def ring(
        self, packed: Any, codes: Any
    ) -> tuple[Callable[[Any, Any], None], Callable[[Any], list[Any]]]:
        """Functions that bring a block's codes on their way to a slot, and that read a slot.

        The codes are those of the rows `lane / 4`, that plus 8, and so on, 4 words each.
        """
        arith, shape = self.arith, self.shape
        steps = range(shape.rows // WIDTH)
        row_bytes, warp_bytes = BLOCK_BYTES * shape.blocks, READ_BYTES * len(steps)
        row = arith.addi(arith.addi(first_output(shape), self.first), self.row)
        source = self.address(packed, row, row_bytes, 16)
        own = arith.addi(
            arith.muli(self.warp, self.word(warp_bytes)), arith.muli(self.lane, self.word(16))
        )
        start = arith.addi(self.shared_address(codes), own)

        def place(slot: Any) -> Any:
            return arith.addi(start, arith.muli(slot, self.word(warp_bytes * shape.warps)))

        def fetch(block: Any, slot: Any) -> None:
            wide = arith.extui(self.i64, self.within(block))
            at = arith.addi(source, arith.muli(wide, self.utils.c(BLOCK_BYTES, self.i64)))
            target = place(slot)
            # Zeros are written, and nothing is read, past the end.
            inside = arith.cmpi(arith.CmpIPredicate.ult, block, self.word(shape.blocks))
            many = arith.select(inside, self.word(16), self.word(0))
            for step in steps:
                offset = self.utils.c(WIDTH * step * row_bytes, self.i64)
                into = arith.addi(target, self.word(READ_BYTES * step))
                self.copy(into, arith.addi(at, offset), many)
            self.asm([], [], "cp.async.commit_group;", stays=True)

        def take(slot: Any) -> list[Any]:
            self.wait(shape.stages - 1)
            source = place(slot)
            return [
                word for step in steps for word in self.load("ld.shared", source, READ_BYTES * step)
            ]

        return fetch, take

    def token(self, column: int) -> Any:
        """The row of x of this lane in an instruction; past the end the last one."""
        token = self.arith.addi(self.row, self.word(WIDTH * column))
        return self.arith.minui(token, self.word(self.shape.tokens - 1))

    def offsets(self, plane: int) -> list[int]:
        """Where a plane's activations lie in a block's, one offset for each load of a lane."""
        size = self.shape.size
        return [size * BLOCK_BYTES * plane + 16 * half for half in range(size)]

    def reader(self, x: Any) -> Callable[[Any], list[Any]]:
        """A function that reads this lane's activations of a block of inputs into registers."""
        arith, shape = self.arith, self.shape
        size, columns = shape.size, range(shape.columns)
        row_bytes = size * BLOCK_CODES * shape.blocks
        starts = [self.address(x, self.token(column), row_bytes, 16 * size) for column in columns]

        def read(block: Any) -> list[Any]:
            wide = arith.extui(self.i64, self.within(block))
            at = arith.muli(wide, self.utils.c(size * BLOCK_CODES, self.i64))
            return [
                word
                for plane in range(PLANES)
                for start in starts
                for offset in self.offsets(plane)
                for word in self.load("ld.global.nc", arith.addi(start, at), offset)
            ]

        return read

    def share_activations(self, x: Any, shared: Any) -> None:
        """Brings all of x on its way to shared memory; every thread of the block has a part."""
        arith, shape = self.arith, self.shape
        stride = shared_row(BLOCK_CODES * shape.blocks, shape.size)
        row_bytes = shape.size * BLOCK_CODES * shape.blocks
        total, threads = shape.tokens * row_bytes // 16, 32 * shape.warps
        start, source = self.shared_address(shared), self.address(x, self.word(0), 0, 0)
        for first in range(0, total, threads):
            index = arith.addi(self.thread, self.word(first))
            # Past the end the last one again.
            index = arith.minui(index, self.word(total - 1))
            at = arith.muli(index, self.word(16))
            token = arith.divui(index, self.word(row_bytes // 16))
            target = arith.addi(at, arith.muli(token, self.word(stride - row_bytes)))
            self.copy(
                arith.addi(start, target),
                arith.addi(source, arith.extui(self.i64, at)),
                self.word(16),
            )
        self.asm([], [], "cp.async.commit_group;", stays=True)

    def shared_reader(self, shared: Any) -> Callable[[Any, int], list[Any]]:
        """A function that reads this lane's activations of a block's plane."""
        arith, shape = self.arith, self.shape
        stride = self.word(shared_row(BLOCK_CODES * shape.blocks, shape.size))
        quarter = arith.muli(self.quarter, self.word(16 * shape.size))
        start = arith.addi(self.shared_address(shared), quarter)
        starts = [
            arith.addi(start, arith.muli(self.token(column), stride))
            for column in range(shape.columns)
        ]

        def read(block: Any, plane: int) -> list[Any]:
            at = arith.muli(block, self.word(shape.size * BLOCK_CODES))
            return [
                word
                for start in starts
                for offset in self.offsets(plane)
                for word in self.load("ld.shared", arith.addi(start, at), offset)
            ]

        return read

    def load(self, kind: str, address: Any, offset: int) -> list[Any]:
        """Sixteen bytes, as words."""
        text = f"{kind}.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        # Loads stay in order: all that are under way together come before what waits for one.
        return self.asm([self.i32] * WORDS, [address], text, stays=True)
