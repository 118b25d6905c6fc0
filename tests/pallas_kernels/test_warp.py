"""A warp's arithmetic, in NumPy in place of machine code: 32 lanes, and PTX's tensor instructions.

Interpret mode runs a plain twin of the kernel for the fewest rows. Here its own code decides which
operands meet, and what is made of the sums; each instruction is done on a word for each lane.
"""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mosaic_mma
from pallas_kernels.mosaic_mma import PLANES, ROWS, WIDTH, WORDS, Multiplier, Shape

LANES = np.arange(32)
ROW, QUARTER = LANES // 4, LANES % 4


def words_of(values):
    """Each lane's last axis, as 32-bit words."""
    return np.ascontiguousarray(values).view(np.uint32)


def bytes_of(words, dtype):
    """(32, elements) of the words of each lane."""
    return np.stack(words, 1).view(dtype)


class Lanes(Multiplier):
    """`Multiplier` of numbers."""

    def __init__(self, shape):
        self.shape = shape
        self.i32 = self.sum_type = None
        self.arith = SimpleNamespace(
            addi=lambda a, b: a + b,
            addf=lambda a, b: a + b,
            subi=lambda a, b: a - b,
            shrsi=lambda a, b: a >> b.astype(np.int32),
        )

    def word(self, value):
        return np.full(32, value, np.uint32)

    def asm(self, results, operands, text, *, stays=False):
        name, choice = text.split()[0], int(text.rstrip(";").split(",")[-1], 16)
        assert name == "prmt.b32"
        pair = bytes_of(operands, np.uint8)
        chosen = [pair[:, choice >> 4 * i & 7] for i in range(4)]
        return [words_of(np.stack(chosen, 1))[:, 0]]

    def mma(self, a, b, sums):
        """ "mma.m16n8k32" and "mma.m16n8k16" of the PTX ISA: which lane has what."""
        exact = self.shape.exact
        left_type, right_type = (np.uint8, np.int8) if exact else (ml_dtypes.bfloat16,) * 2
        size = 4 if exact else 2
        left, right = np.zeros((16, 8 * size)), np.zeros((8 * size, 8))
        for register, word in enumerate(a):
            elements = bytes_of([word], left_type)
            for i in range(size):
                at = QUARTER * size + i + 4 * size * (register // 2)
                left[ROW + 8 * (register % 2), at] = elements[:, i]
        for register, word in enumerate(b):
            elements = bytes_of([word], right_type)
            for i in range(size):
                right[QUARTER * size + i + 4 * size * register, ROW] = elements[:, i]
        product = (left @ right).astype(np.int32 if exact else np.float32)
        return [
            sums[i] + product[ROW + 8 * (i // 2), 2 * QUARTER + i % 2] for i in range(len(sums))
        ]


@pytest.fixture
def numbers(monkeypatch):
    """The decoding of words, in NumPy."""

    def sign_word(word):
        fields = [(word >> np.uint32(2 * i)) & np.uint32(3) for i in range(16)]
        signs = [(f - np.uint32(1)) & np.uint32(3) for f in fields]
        return sum((s << np.uint32(2 * i) for i, s in enumerate(signs)), np.zeros(32, np.uint32))

    monkeypatch.setattr(mosaic_mma, "sign_word", sign_word)
    monkeypatch.setattr(
        mosaic_mma,
        "top_bits",
        lambda word, shift, mask: word << np.uint32(shift) & np.uint32(mask),
    )
    monkeypatch.setattr(
        mosaic_mma, "masked", lambda word, shift, mask: word >> np.uint32(shift) & np.uint32(mask)
    )


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_a_warp_s_sums_are_the_product(numbers, exact, tokens, rows):
    random = np.random.default_rng(0)
    shape = Shape(
        tokens=tokens, outputs=ROWS, blocks=2, warps=4, rows=rows, stages=2, ahead=True, exact=exact
    )
    warp = Lanes(shape)
    sums = [np.zeros(32, np.int32 if exact else np.float32)] * (
        4 * shape.columns * (2 * shape.tiles + int(exact))
    )
    wanted = np.zeros((rows, 8 * shape.columns))
    for _ in range(shape.blocks):
        codes = random.integers(0, 3, (rows, PLANES, 64), np.uint8)
        packed = sum(codes[:, plane] << 2 * plane for plane in range(PLANES)).astype(np.uint8)
        whole = random.integers(-127, 128, (tokens, PLANES, 64))
        x = whole.astype(np.int8) if exact else (whole / 8).astype(ml_dtypes.bfloat16)
        # As a lane reads them: 16 packed bytes of each eighth row, and the activations of each
        # plane that belong to them.
        mine = packed.reshape(rows // WIDTH, WIDTH, 4, 16)[:, ROW, QUARTER]
        read = [words_of(mine[step])[:, word] for step in range(len(mine)) for word in range(WORDS)]
        activations = []
        for column in range(shape.columns):
            token = np.minimum(ROW + WIDTH * column, tokens - 1)
            for plane in range(PLANES):
                some = x[token, plane].reshape(32, 4, 16)[LANES, QUARTER]
                activations += list(words_of(some).T)
        assert len(activations) == shape.words
        sums = warp.multiply(read, activations, sums)
        padded = np.minimum(np.arange(8 * shape.columns), tokens - 1)
        signs = codes.reshape(rows, -1) - 1.0
        wanted += signs @ x[padded].reshape(len(padded), -1).astype(np.float64).T
    found = np.zeros_like(wanted)
    joined = warp.joined(sums)
    for tile in range(shape.tiles):
        for column in range(shape.columns):
            for i in range(4):
                value = joined[4 * (tile * shape.columns + column) + i]
                found[16 * tile + ROW + 8 * (i // 2), 8 * column + 2 * QUARTER + i % 2] = value
    # Of bfloat16 twice as large, see `mosaic_decode.unscaled`.
    np.testing.assert_array_equal(found if exact else found / 2, wanted)
