"""What a warp multiplies: operands of the tensor cores from words that its lanes have.

The instructions are `mma.sync` (PTX ISA, "Warp-level matrix instructions"): of a warp's lane, the
row is `lane / 4`, and `lane % 4` says which quarter of the inputs it has.

Decoding is what takes time, so it is an instruction or two for each operand of four codes or two:

- int8 activations meet the codes themselves, masked where they lie: those of every second plane are
  four times as large, and are summed apart. In the end the sums of the activations, which come of
  one more product for all rows, are taken off. All of it is exact.
- bfloat16 ones meet signs at the top of an operand (`mosaic_decode.TOP`), two codes that lie 16
  bits apart; the activations are paired likewise. Those sums are too large (`unscaled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pallas_kernels.mosaic_decode import masked, mlir, sign_word, top_bits
from pallas_kernels.tiles import AHEAD

# Outputs and tokens of an instruction, planes of a packed byte, and 32-bit words that a lane reads
# at once.
HEIGHT, WIDTH, PLANES, WORDS = 16, 8, 4, 4
# What a warp reads at once: 64 packed bytes of 8 rows.
READ_BYTES = 512


class Shape(NamedTuple):
    """Sizes that are known when the kernel is compiled.

    Attributes:
      tokens: rows of x that there are; 1 to 16.
      outputs: rows of the packed weight.
      tile: of them, those of a thread block. The last block's overlap with the one before.
      blocks: of 256 inputs.
      warps: of a thread block.
      rows: outputs of a warp. Neighbouring warps have the others of the tile.
      stages: blocks of inputs whose codes a warp has under way.
      activations: how they are read; see `DirectTile`.
      exact: int8 activations; bfloat16 otherwise.
    """

    tokens: int
    outputs: int
    tile: int
    blocks: int
    warps: int
    rows: int
    stages: int
    activations: str
    exact: bool

    @property
    def reads_ahead(self) -> bool:
        """Whether two blocks' activations are held at once: if there is a next, and room."""
        room = self.words <= 2 * PLANES * WORDS
        return self.activations == AHEAD and room and self.blocks > self.shares

    @property
    def shares(self) -> int:
        """How many warps share the blocks of inputs out."""
        return self.warps * self.rows // self.tile

    @property
    def tiles(self) -> int:
        """How many instructions a warp's outputs take."""
        return self.rows // HEIGHT

    @property
    def columns(self) -> int:
        """How many instructions the tokens take."""
        return -(-self.tokens // WIDTH)

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return 1 if self.exact else 2

    @property
    def sets(self) -> int:
        """How many sums there are of a value, for every second plane, or for all of them.

        int8's planes are of two sizes. Of bfloat16 it is registers against neighbouring
        instructions that wait for each other, if there are few between them.
        """
        return 2 if self.exact or self.tiles * self.columns < 4 else 1

    @property
    def words(self) -> int:
        """How many words of activations a lane has for a block of inputs."""
        return self.columns * PLANES * WORDS * self.size

    @property
    def plane_words(self) -> int:
        """How many of these words are of one plane."""
        return self.words // PLANES


def _part(values: list[Any], index: int, size: int) -> list[Any]:
    return values[size * index : size * (index + 1)]


class Multiplier:
    """Emits the arithmetic of one lane. Values are 32-bit words unless said otherwise."""

    def __init__(self, shape: Shape):
        from jax.experimental.mosaic.gpu import utils

        self.shape, self.utils = shape, utils
        self.ir, self.arith, self.llvm, self.scf = mlir("ir", "arith", "llvm", "scf")
        self.i32 = self.ir.IntegerType.get_signless(32)
        self.i64 = self.ir.IntegerType.get_signless(64)
        self.sum_type = self.i32 if shape.exact else self.ir.F32Type.get()

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

    def multiply(
        self, codes: list[Any], x: Callable[[int], list[Any]], sums: list[Any]
    ) -> list[Any]:
        """The sums with a block's more.

        Args:
          codes: words of the rows that a lane has, 4 of each.
          x: gives a plane's activations: of each 8 tokens, 4 words of int8 or 8 of bfloat16.
          sums: four values for each of `sets`, tile of 16 outputs and 8 tokens, in this
            order; then, of int8, as many for each 8 tokens, of the activations themselves.
        """
        shape, sums = self.shape, list(sums)
        tiles, columns = range(shape.tiles), range(shape.columns)

        def add(left: list[Any], right: list[Any], where: int) -> None:
            at = slice(4 * where, 4 * where + 4)
            sums[at] = self.mma(left, right, sums[at])

        words = [_part(codes, tile, 2 * WORDS) for tile in tiles]
        if not shape.exact:
            words = [[sign_word(word) for word in some] for some in words]
        ones = [self.word(0x01010101)] * 4
        for plane in range(PLANES):
            activations = x(plane)
            for part in range(WORDS // 2 if shape.exact else WORDS):
                right = [self.right(activations, column, part) for column in columns]
                for tile in tiles:
                    left = self.left(words[tile], plane, part)
                    for column in columns:
                        where = (plane % shape.sets * shape.tiles + tile) * shape.columns + column
                        add(left, right[column], where)
                for column in columns if shape.exact else ():
                    add(ones, right[column], shape.sets * shape.tiles * shape.columns + column)
        return sums

    def left(self, words: list[Any], plane: int, part: int) -> list[Any]:
        """An instruction's operand of 16 rows: of a plane, 32 int8 or 16 bfloat16 of each.

        Args:
          words: 4 of the row `lane / 4`, and 4 of that plus 8; codes of int8, signs of bfloat16.
          plane, part: which codes of them: two words of int8, one of bfloat16.
        """
        upper, lower = words[:WORDS], words[WORDS:]
        if self.shape.exact:
            down, mask = (4 if plane >= 2 else 0), (0x03030303, 0x0C0C0C0C)[plane % 2]
            return [
                masked(row[2 * part + i], down, mask) for i in range(2) for row in (upper, lower)
            ]
        # Of each half of the word its upper byte, then its lower one.
        return [
            top_bits(row[part], first + 2 * (PLANES - 1 - plane), 0xC000C000)
            for first in (0, 8)
            for row in (upper, lower)
        ]

    def right(self, x: list[Any], column: int, part: int) -> list[Any]:
        """An instruction's operand of 8 tokens, of the inputs that `left` has."""
        at = column * WORDS * self.shape.size + 2 * part
        pair = x[at : at + 2]
        if self.shape.exact:
            return pair
        # Of four inputs the second and fourth, then the first and third.
        return [
            self.asm([self.i32], pair, f"prmt.b32 $0, $1, $2, {choice};")[0]
            for choice in ("0x7632", "0x5410")
        ]

    def joined(self, sums: list[Any]) -> list[Any]:
        """Four values for each tile of 16 outputs and 8 tokens, from those of `multiply`."""
        shape, arith = self.shape, self.arith
        many = 4 * shape.tiles * shape.columns
        even, odd, tokens = sums[:many], sums[many : 2 * many], sums[2 * many :]
        if shape.sets == 1:
            return even
        if not shape.exact:
            return [arith.addf(*both) for both in zip(even, odd, strict=True)]
        # The odd planes' codes were four times as large.
        codes = [
            arith.addi(one, arith.shrsi(four, self.word(2)))
            for one, four in zip(even, odd, strict=True)
        ]
        return [arith.subi(value, tokens[i % len(tokens)]) for i, value in enumerate(codes)]

    def mma(self, a: list[Any], b: list[Any], sums: list[Any]) -> list[Any]:
        """`sums + a @ b` of 16 outputs and 8 tokens; 32 inputs in 8 bits, or 16 of bfloat16."""
        kinds = "k32.row.col.s32.u8.s8.s32" if self.shape.exact else "k16.row.col.f32.bf16.bf16.f32"
        text = (
            f"mma.sync.aligned.m16n8{kinds} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};"
        )
        return self.asm([self.sum_type] * 4, [*a, *b, *sums], text)
