"""What a warp does for a product of a few rows, below Pallas: loads, decoding and tensor cores.

A lane reads 16 packed bytes of a row at once, and the activations that belong to their 64 codes.
The tensor cores' operands are then made of what the lane itself has: which inputs share an
instruction does not matter, as long as both operands agree. So nothing moves between lanes, and no
warp waits for another before its sums are done. The codes of several blocks of inputs are on their
way at once, through places in shared memory that are a lane's own.

The instructions are `mma.sync` (PTX ISA, "Warp-level matrix instructions"): of a warp's lane, the
row is `lane / 4`, and `lane % 4` says which quarter of the inputs it has.

Codes become signs as in `mosaic_decode`, and so the sums are too large (`unscaled`).

Pallas offers none of this, so it is written for the level below (`inline_mgpu`), which its
interpret mode does not run: there, `mosaic_direct` does the same in plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pallas_kernels.mosaic_api import plgpu
from pallas_kernels.mosaic_decode import mlir, sign_word, top_bits
from pallas_kernels.mosaic_epilogue import LAYOUT
from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES

# Outputs of a block, outputs and tokens of an instruction, planes of a packed byte, and 32-bit
# words that a lane reads at once.
ROWS, HEIGHT, WIDTH, PLANES, WORDS = 64, 16, 8, 4, 4
# Of the codes that a lane reads of a block of inputs.
LANE_BYTES = 16 * ROWS // WIDTH
# Sums that a warp adds to in turn.
_IN_TURN = 4


class Shape(NamedTuple):
    """Sizes that are known when the kernel is compiled.

    Attributes:
      tokens: rows of x that there are; 1 to 16.
      outputs: rows of the packed weight.
      blocks: of 256 inputs.
      warps: of a thread block, which share the blocks of inputs out.
      stages: blocks of inputs whose codes a warp has under way.
      exact: int8 activations; bfloat16 otherwise.
    """

    tokens: int
    outputs: int
    blocks: int
    warps: int
    stages: int
    exact: bool

    @property
    def columns(self) -> int:
        """How many instructions the tokens take."""
        return -(-self.tokens // WIDTH)

    @property
    def words(self) -> int:
        """Of activations that a lane has for a block of inputs."""
        return self.columns * PLANES * WORDS * (1 if self.exact else 2)


def write_partial_sums(x: Any, packed: Any, codes: Any, parts: Any, shape: Shape) -> None:
    """Each warp's sums over its share of the inputs, too large (`mosaic_decode.unscaled`).

    Args:
      x: (tokens, 256 * blocks) in global memory, C order.
      packed: (outputs, 64 * blocks) likewise; the grid's first axis has a block for 64 rows of it.
      codes: (stages, warps, 4096) uint8 in shared memory.
      parts: (warps, 64, 8 * columns) int32 or float32 in shared memory; each warp writes its own.
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


def _first_row() -> Any:
    """The first output of this thread block."""
    from jax.experimental.mosaic.gpu import utils

    ir, arith, gpu = mlir("ir", "arith", "gpu")
    i32 = ir.IntegerType.get_signless(32)
    block = arith.index_cast(i32, gpu.block_id(gpu.Dimension.x))
    return arith.muli(block, utils.c(ROWS, i32))


def _part(values: list[Any], index: int, size: int) -> list[Any]:
    return values[size * index : size * (index + 1)]


class _Warp:
    """Emits the program of one lane. Values are 32-bit words unless said otherwise."""

    def __init__(self, shape: Shape):
        from jax.experimental.mosaic.gpu import utils

        self.shape, self.utils = shape, utils
        self.ir, self.arith, self.llvm, self.scf = mlir("ir", "arith", "llvm", "scf")
        self.i32 = self.ir.IntegerType.get_signless(32)
        self.i64 = self.ir.IntegerType.get_signless(64)
        self.sum_type = self.i32 if shape.exact else self.ir.F32Type.get()
        thread = utils.thread_idx()
        self.lane = lane = self.arith.andi(thread, self.word(31))
        self.warp = self.arith.shrui(thread, self.word(5))
        self.row = self.arith.shrui(lane, self.word(2))
        self.quarter = self.arith.andi(lane, self.word(3))

    def word(self, value: int) -> Any:
        """A constant, from its unsigned value."""
        return self.utils.c(value - (value >> 31 << 32), self.i32)

    def asm(
        self, results: Sequence[Any], operands: list[Any], text: str, *, stays: bool = False
    ) -> list[Any]:
        """An instruction's results.

        Args:
          results, operands: types, and values.
          text: of PTX, with the results first.
          stays: whether it is kept where it stands among others that are.
        """
        letters = {self.i32: "r", self.i64: "l"}
        outs = [f"={letters.get(kind, 'f')}" for kind in results]
        constraints = ",".join([*outs, *(letters.get(v.type, "f") for v in operands)])
        one = len(results) == 1
        if not results:
            kind = self.ir.Type.parse("!llvm.void")
        else:
            kind = results[0] if one else self.llvm.StructType.get_literal(list(results))
        made: Any = self.llvm.inline_asm(kind, operands, text, constraints, has_side_effects=stays)
        if one:
            return [made]
        return [self.llvm.extractvalue(each, made, [i]) for i, each in enumerate(results)]

    def run(self, x: Any, packed: Any, codes: Any, parts: Any) -> None:
        """The whole of it."""
        shape, arith, scf = self.shape, self.arith, self.scf
        fetch, take = self.ring(packed, codes)
        read, touch = self.reader(x)
        index = self.ir.IndexType.get()
        count = 4 * ROWS // HEIGHT * shape.columns
        zero = self.utils.c(0 if shape.exact else 0.0, self.sum_type)
        # Two blocks' activations at once, where there are registers for them.
        ahead = shape.words <= 2 * PLANES * WORDS

        def block(step: Any) -> Any:
            return arith.addi(self.warp, arith.muli(step, self.word(shape.warps)))

        # Activations first, which are few: what is asked for first comes first.
        first = read(block(self.word(0))) if ahead else []
        for step in range(shape.stages):
            touch(block(self.word(step)))
        for step in range(shape.stages):
            fetch(block(self.word(step)), self.word(step))
        warps = self.word(shape.warps)
        mine = arith.subi(self.word(shape.blocks + shape.warps - 1), self.warp)
        trips = arith.index_cast(index, arith.divui(mine, warps))
        bounds = (self.utils.c(0, index), trips, self.utils.c(1, index))
        loop = scf.ForOp(*bounds, [*[zero] * count, *first])
        with self.ir.InsertionPoint(loop.body):
            carried = list(loop.inner_iter_args)
            step = arith.index_cast(self.i32, loop.induction_variable)
            if ahead:
                now, then = carried[count:], read(block(arith.addi(step, self.word(1))))
            else:
                now, then = read(block(step)), []
            slot = arith.remui(step, self.word(shape.stages))
            sums = self.multiply(take(slot), now, carried[:count])
            # The slot is read: what was in it has been multiplied.
            later = block(arith.addi(step, self.word(shape.stages)))
            touch(later)
            fetch(later, slot)
            scf.yield_([*sums, *then])
        self.write(parts, list(loop.results)[:count])

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

    def ring(self, packed: Any, codes: Any) -> tuple[Callable[..., None], Callable[..., list[Any]]]:
        """Functions that bring a block's codes on their way to a slot, and that read a slot.

        The codes are those of the rows `lane / 4`, that plus 8, and so on, 4 words each.
        """
        arith, shape = self.arith, self.shape
        width, first = BLOCK_BYTES * shape.blocks, _first_row()
        rows: list[tuple[Any, int]] = []
        for step in range(ROWS // WIDTH):
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
            arith.muli(self.warp, self.word(LANE_BYTES * 32)), arith.muli(self.lane, self.word(16))
        )
        start = arith.addi(start, own)

        def place(slot: Any) -> Any:
            return arith.addi(start, arith.muli(slot, self.word(LANE_BYTES * 32 * shape.warps)))

        def fetch(block: Any, slot: Any) -> None:
            at = arith.muli(
                arith.extui(self.i64, self.within(block)), self.utils.c(BLOCK_BYTES, self.i64)
            )
            target = place(slot)
            # Zeros are written, and nothing is read, past the end.
            inside = arith.cmpi(arith.CmpIPredicate.ult, block, self.word(shape.blocks))
            many = arith.select(inside, self.word(16), self.word(0))
            for step, (pointer, offset) in enumerate(rows):
                text = f"cp.async.cg.shared.global [$0 + {512 * step}], [$1 + {offset}], 16, $2;"
                self.asm([], [target, arith.addi(pointer, at), many], text, stays=True)
            self.asm([], [], "cp.async.commit_group;", stays=True)

        def take(slot: Any) -> list[Any]:
            # Of a lane's own copies: no other's are waited for.
            self.asm([], [], f"cp.async.wait_group {shape.stages - 1};", stays=True)
            source = place(slot)
            return [
                word
                for step in range(len(rows))
                for word in self.load("ld.shared", source, 512 * step)
            ]

        return fetch, take

    def reader(self, x: Any) -> tuple[Callable[[Any], list[Any]], Callable[[Any], None]]:
        """Functions that read this lane's activations of a block of inputs, and that call them in.

        They are, of each instruction's token and each plane, 4 words of int8 or 8 of bfloat16.
        Called in, they come to the second-level cache while others are multiplied.
        """
        arith, shape = self.arith, self.shape
        size = 1 if shape.exact else 2
        tokens = []
        for column in range(shape.columns):
            token = arith.addi(self.row, self.word(WIDTH * column))
            token = arith.minui(token, self.word(shape.tokens - 1))
            tokens.append(self.pointer(x, token, size * BLOCK_CODES * shape.blocks, 16 * size))

        def places(block: Any) -> list[tuple[Any, int]]:
            wide = arith.extui(self.i64, self.within(block))
            at = arith.muli(wide, self.utils.c(size * BLOCK_CODES, self.i64))
            starts = [arith.addi(start, at) for start in tokens]
            offsets = [size * BLOCK_BYTES * plane for plane in range(PLANES)]
            return [(start, offset) for start in starts for offset in offsets]

        def read(block: Any) -> list[Any]:
            return [
                word
                for start, offset in places(block)
                for half in range(size)
                for word in self.load("ld.global.nc", start, offset + 16 * half)
            ]

        def touch(block: Any) -> None:
            for start, offset in places(block):
                self.asm([], [start], f"prefetch.global.L2 [$0 + {offset}];", stays=True)

        return read, touch

    def load(self, kind: str, address: Any, offset: int) -> list[Any]:
        """Sixteen bytes, as words."""
        text = f"{kind}.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        # Loads stay in order: all that are under way together come before what waits for one.
        return self.asm([self.i32] * WORDS, [address], text, stays=True)

    def multiply(self, codes: list[Any], x: list[Any], sums: list[Any]) -> list[Any]:
        """The sums with a block's more; four values for each tile of 16 outputs and 8 tokens."""
        shape, sums = self.shape, list(sums)
        per_plane = WORDS if shape.exact else 2 * WORDS
        # As many sums in turn as hide the time of an instruction: neighbours must not wait for each
        # other. More would take registers.
        some = max(1, _IN_TURN // shape.columns)
        for first in range(0, ROWS // HEIGHT, some):
            tiles = range(first, first + some)
            signs = {t: [sign_word(w) for w in _part(codes, t, 2 * WORDS)] for t in tiles}
            for plane in range(PLANES):
                for part in range(per_plane // 2):
                    for tile in tiles:
                        left = self.left(signs[tile], plane, part)
                        for column in range(shape.columns):
                            at = (column * PLANES + plane) * per_plane + 2 * part
                            where = 4 * (tile * shape.columns + column)
                            done = self.mma(left, x[at : at + 2], sums[where : where + 4])
                            sums[where : where + 4] = done
        return sums

    def left(self, signs: list[Any], plane: int, part: int) -> list[Any]:
        """An instruction's operand of 16 rows: of a plane, 32 int8 or 16 bfloat16 of each.

        Args:
          signs: 4 words of the row `lane / 4`, and 4 of that plus 8.
          plane, part: which codes of them; as many parts as it takes for all words.
        """
        upper, lower = signs[:WORDS], signs[WORDS:]
        count = 2 if self.shape.exact else 1
        shift = 2 * (PLANES - 1 - plane)
        both = [
            top_bits(row[part * count + i], shift, 0xC0C0C0C0)
            for i in range(count)
            for row in (upper, lower)
        ]
        if self.shape.exact:
            return both
        # Two bytes to the upper halves of two bfloat16.
        return [
            self.asm([self.i32], [word], f"prmt.b32 $0, $1, 0, {choice};")[0]
            for choice in ("0x1404", "0x3424")
            for word in both
        ]

    def mma(self, a: list[Any], b: list[Any], sums: list[Any]) -> list[Any]:
        """`sums + a @ b` of 16 outputs and 8 tokens; 32 inputs of int8, or 16 of bfloat16."""
        kinds = "k32.row.col.s32.s8.s8.s32" if self.shape.exact else "k16.row.col.f32.bf16.bf16.f32"
        text = (
            f"mma.sync.aligned.m16n8{kinds} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};"
        )
        return self.asm([self.sum_type] * 4, [*a, *b, *sums], text)

    def write(self, parts: Any, sums: list[Any]) -> None:
        """A warp's sums to its part of shared memory."""
        arith, llvm, columns = self.arith, self.llvm, self.shape.columns
        width = WIDTH * columns
        row = arith.addi(arith.muli(self.warp, self.word(ROWS)), self.row)
        lane = arith.addi(arith.muli(row, self.word(width)), arith.muli(self.quarter, self.word(2)))
        start = self.utils.memref_ptr(parts)
        for tile in range(ROWS // HEIGHT):
            for column in range(columns):
                for value in range(4):
                    # Of rows `lane / 4` and that plus 8, two neighbouring tokens each.
                    half, token = divmod(value, 2)
                    at = (HEIGHT * tile + WIDTH * half) * width + WIDTH * column + token
                    index = arith.addi(lane, self.word(at))
                    place = self.utils.getelementptr(start, [index], self.sum_type)
                    llvm.store(sums[4 * (tile * columns + column) + value], place)
