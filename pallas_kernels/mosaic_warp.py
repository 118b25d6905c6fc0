"""What a warp does for a product of a few rows, below Pallas: loads, decoding and tensor cores.

A lane reads 16 packed bytes of a row at once, and the activations that belong to their 64 codes.
The tensor cores' operands are then made of what the lane itself has: which inputs share an
instruction does not matter, as long as both operands agree. So nothing moves between lanes, and no
warp waits for another before its sums are done. The codes of several blocks of inputs are on their
way at once, through places in shared memory that are a lane's own.

Pallas offers none of this, so it is written for the level below (`inline_mgpu`), which its
interpret mode does not run: there, `mosaic_direct` does the same in plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.mosaic_api import plgpu
from pallas_kernels.mosaic_decode import mlir
from pallas_kernels.mosaic_epilogue import LAYOUT
from pallas_kernels.mosaic_mma import (
    HEIGHT,
    PLANES,
    READ_BYTES,
    ROWS,
    SETS,
    WIDTH,
    WORDS,
    Multiplier,
    Shape,
)
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES

# What a copy of codes or activations brings into the second-level cache around it.
PREFETCH = ""


def write_partial_sums(x: Any, packed: Any, codes: Any, parts: Any, shape: Shape) -> None:
    """Each warp's sums over its share of the inputs; of bfloat16 too large (`unscaled`).

    Args:
      x: (tokens, 256 * blocks) in global memory, C order.
      packed: (outputs, 64 * blocks) likewise; the grid's first axis has a block for 64 rows of it.
      codes: (stages, warps, slot_bytes) uint8 in shared memory.
      parts: (shares, 64, 8 * columns) int32 or float32 in shared memory; each warp writes its own.
    """
    refs = (plgpu.RefType(),) * 4

    @plgpu.inline_mgpu(arg_types=refs)
    def run(_: Any, x: Any, packed: Any, codes: Any, parts: Any) -> None:
        _Warp(shape).run(x, packed, codes, parts)

    run(x, packed, codes, parts)  # pyright: ignore[reportCallIssue]


def write_result(y: Any, value: Any, tokens: int, outputs: int) -> None:
    """Writes what lies within the result.

    Args:
      y: (tokens, outputs) in global memory, C order.
      value: (64, tokens or more) in the accumulators' layout; the grid's first axis says which.
      tokens, outputs: how many there are.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT))
    def write(_: Any, y: Any, value: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        ir, arith, llvm = mlir("ir", "arith", "llvm")
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        bits = utils.bitwidth(value.mlir_dtype)
        whole = ir.IntegerType.get_signless(bits)
        start, first = utils.memref_ptr(y), _first_row()
        letter = {16: "h", 32: "r"}[bits]

        def one(element: Any, at: tuple[Any, Any]) -> None:
            row, token = (arith.index_cast(i32, index) for index in at)
            row = arith.addi(row, first)
            inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, row, utils.c(outputs, i32)),
                arith.cmpi(arith.CmpIPredicate.slt, token, utils.c(tokens, i32)),
            )
            wide = arith.muli(arith.extui(i64, token), utils.c(outputs, i64))
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


def _first_row() -> Any:
    """The first output of this thread block."""
    from jax.experimental.mosaic.gpu import utils

    ir, arith, gpu = mlir("ir", "arith", "gpu")
    i32 = ir.IntegerType.get_signless(32)
    block = arith.index_cast(i32, gpu.block_id(gpu.Dimension.x))
    return arith.muli(block, utils.c(ROWS, i32))


class _Warp(Multiplier):
    """Emits the program of one lane."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        thread = self.utils.thread_idx()
        self.lane = lane = self.arith.andi(thread, self.word(31))
        self.warp = self.arith.shrui(thread, self.word(5))
        parts = self.word(ROWS // shape.rows)
        self.share = self.arith.divui(self.warp, parts)
        # Of the block's rows, the first of the warp's; and of each eight rows, the lane's.
        part = self.arith.remui(self.warp, parts)
        self.first = self.arith.muli(part, self.word(shape.rows))
        self.row = self.arith.shrui(lane, self.word(2))
        self.quarter = self.arith.andi(lane, self.word(3))

    def run(self, x: Any, packed: Any, codes: Any, parts: Any) -> None:
        """The whole of it."""
        shape, arith = self.shape, self.arith
        places = self.places(x)
        read, (fetch, take) = self.reader(places), self.ring(packed, codes, places)
        count = 4 * shape.columns * (SETS * shape.tiles + int(shape.exact))
        zero = self.utils.c(0 if shape.exact else 0.0, self.sum_type)
        early = shape.reads_ahead

        def block(step: Any) -> Any:
            return arith.addi(self.share, arith.muli(step, self.word(shape.shares)))

        # Activations before codes, of which there are more: what is asked for first comes first.
        first = read(block(self.word(0))) if early else []
        for step in range(shape.stages):
            fetch(block(self.word(step)), self.word(step))

        def multiply(step: Any, carried: list[Any]) -> list[Any]:
            now, then = carried[count:], []
            if early:
                then = read(block(arith.addi(step, self.word(1))))
            elif not shape.staged:
                now = read(block(step))
            slot = arith.remui(step, self.word(shape.stages))
            words = take(slot)
            own, staged = words[: shape.code_words], words[shape.code_words :]
            sums = self.multiply(own, staged or now, carried[:count])
            # The slot is read: what was in it has been multiplied.
            fetch(block(arith.addi(step, self.word(shape.stages))), slot)
            return [*sums, *then]

        mine = arith.subi(self.word(shape.blocks + shape.shares - 1), self.share)
        trips = arith.divui(mine, self.word(shape.shares))
        sums = self.loop(trips, [*[zero] * count, *first], multiply)
        self.write(parts, self.joined(sums[:count]))

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

    def pointer(self, ref: Any, row: Any, stride: int, lane_bytes: int) -> Any:
        """The 64-bit address of this lane's first bytes of a row."""
        arith = self.arith
        at = arith.addi(
            arith.muli(arith.extui(self.i64, row), self.utils.c(stride, self.i64)),
            arith.extui(self.i64, arith.muli(self.quarter, self.word(lane_bytes))),
        )
        return arith.addi(self.llvm.ptrtoint(self.i64, self.utils.memref_ptr(ref)), at)

    def within(self, block: Any) -> Any:
        """The block of inputs, or the last one: what is read past the end is not used."""
        return self.arith.minui(block, self.word(self.shape.blocks - 1))

    def ring(
        self, packed: Any, codes: Any, activations: list[tuple[Any, int]]
    ) -> tuple[Callable[..., None], Callable[..., list[Any]]]:
        """Functions that bring a block on its way to a slot, and that read a slot.

        In a slot are the codes of the rows `lane / 4`, that plus 8, and so on, 4 words each; then,
        if they are staged, the activations of `places`.
        """
        arith, shape = self.arith, self.shape
        width, first = BLOCK_BYTES * shape.blocks, arith.addi(_first_row(), self.first)
        rows: list[tuple[Any, int]] = []
        for step in range(shape.rows // WIDTH):
            row = arith.addi(arith.addi(first, self.word(WIDTH * step)), self.row)
            if shape.outputs % ROWS:
                # Rows past the end are the last one: what becomes of them is never written.
                row = arith.minui(row, self.word(shape.outputs - 1))
            elif step:
                rows.append((rows[0][0], WIDTH * step * width))
                continue
            rows.append((self.pointer(packed, row, width, 16), 0))
        start = self.llvm.ptrtoint(self.i32, self.utils.memref_ptr(codes))
        own = arith.addi(
            arith.muli(self.warp, self.word(shape.slot_bytes)),
            arith.muli(self.lane, self.word(16)),
        )
        start = arith.addi(start, own)

        def place(slot: Any) -> Any:
            return arith.addi(start, arith.muli(slot, self.word(shape.slot_bytes * shape.warps)))

        def fetch(block: Any, slot: Any) -> None:
            wide = arith.extui(self.i64, self.within(block))
            target = place(slot)
            # Zeros are written, and nothing is read, past the end.
            inside = arith.cmpi(arith.CmpIPredicate.ult, block, self.word(shape.blocks))
            many = arith.select(inside, self.word(16), self.word(0))

            def copy(kind: str, into: int, start: Any, offset: int, block_bytes: int) -> None:
                at = arith.addi(start, arith.muli(wide, self.utils.c(block_bytes, self.i64)))
                places = f"[$0 + {READ_BYTES * into}], [$1 + {offset}]"
                text = f"cp.async.{kind}.shared.global{PREFETCH} {places}, 16, $2;"
                self.asm([], [target, at, many], text, stays=True)

            if shape.staged:
                # Through the first-level cache: other warps and blocks read the same.
                for into, (start, offset) in enumerate(activations, len(rows)):
                    copy("ca", into, start, offset, shape.size * BLOCK_CODES)
            for into, (start, offset) in enumerate(rows):
                copy("cg", into, start, offset, BLOCK_BYTES)
            self.asm([], [], "cp.async.commit_group;", stays=True)

        def take(slot: Any) -> list[Any]:
            # Of a lane's own copies: no other's are waited for.
            self.asm([], [], f"cp.async.wait_group {shape.stages - 1};", stays=True)
            source = place(slot)
            return [
                word
                for step in range(shape.slot_bytes // READ_BYTES)
                for word in self.load("ld.shared", source, READ_BYTES * step)
            ]

        return fetch, take

    def places(self, x: Any) -> list[tuple[Any, int]]:
        """Where this lane's activations of the first block of inputs are, 16 bytes each.

        They are, of each instruction's token and each plane, 4 words of int8 or 8 of bfloat16.

        Returns:
          Addresses, and offsets from them.
        """
        arith, shape = self.arith, self.shape
        size = shape.size
        tokens = []
        for column in range(shape.columns):
            token = arith.addi(self.row, self.word(WIDTH * column))
            token = arith.minui(token, self.word(shape.tokens - 1))
            tokens.append(self.pointer(x, token, size * BLOCK_CODES * shape.blocks, 16 * size))
        return [
            (start, size * BLOCK_BYTES * plane + 16 * half)
            for start in tokens
            for plane in range(PLANES)
            for half in range(size)
        ]

    def reader(self, places: list[tuple[Any, int]]) -> Callable[[Any], list[Any]]:
        """A function that reads this lane's activations of a block of inputs into registers."""

        def read(block: Any) -> list[Any]:
            wide = self.arith.extui(self.i64, self.within(block))
            at = self.arith.muli(wide, self.utils.c(self.shape.size * BLOCK_CODES, self.i64))
            return [
                word
                for start, offset in places
                for word in self.load("ld.global.nc", self.arith.addi(start, at), offset)
            ]

        return read

    def load(self, kind: str, address: Any, offset: int) -> list[Any]:
        """Sixteen bytes, as words."""
        text = f"{kind}.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        # Loads stay in order: all that are under way together come before what waits for one.
        return self.asm([self.i32] * WORDS, [address], text, stays=True)

    def write(self, parts: Any, sums: list[Any]) -> None:
        """A warp's sums to its part of shared memory."""
        arith, llvm, columns = self.arith, self.llvm, self.shape.columns
        width = WIDTH * columns
        row = arith.addi(arith.muli(self.share, self.word(ROWS)), self.first)
        row = arith.addi(row, self.row)
        lane = arith.addi(arith.muli(row, self.word(width)), arith.muli(self.quarter, self.word(2)))
        start = self.utils.memref_ptr(parts)
        for tile in range(self.shape.tiles):
            for column in range(columns):
                for value in range(4):
                    # Of rows `lane / 4` and that plus 8, two neighbouring tokens each.
                    half, token = divmod(value, 2)
                    at = (HEIGHT * tile + WIDTH * half) * width + WIDTH * column + token
                    index = arith.addi(lane, self.word(at))
                    place = self.utils.getelementptr(start, [index], self.sum_type)
                    llvm.store(sums[4 * (tile * columns + column) + value], place)
