"""A warp's program for the fewest rows, in NumPy in place of machine code.

Interpret mode runs a plain twin of the kernel. Here its own code decides what is read, which
operands meet, and what is made of the sums (`lanes`).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mosaic_mma, mosaic_warp
from pallas_kernels.mosaic_mma import PLANES, ROWS, WIDTH, WORDS, Shape
from pallas_kernels.tiles import AHEAD, LATE, STAGED
from tests.pallas_kernels.lanes import LANES, QUARTER, ROW, Lanes, Machine, Memory, words_of


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
        tokens=tokens,
        outputs=ROWS,
        blocks=2,
        warps=4,
        rows=rows,
        stages=2,
        activations=AHEAD,
        exact=exact,
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


def products(random, shape):
    """Packed codes, activations, and their exact product."""
    codes = random.integers(0, 3, (shape.outputs, shape.blocks, PLANES, 64), np.uint8)
    packed = sum(codes[:, :, plane] << 2 * plane for plane in range(PLANES)).astype(np.uint8)
    whole = random.integers(-127, 128, (shape.tokens, 256 * shape.blocks))
    x = whole.astype(np.int8) if shape.exact else (whole / 8).astype(ml_dtypes.bfloat16)
    signs = codes.reshape(shape.outputs, -1) - 1.0
    return packed.reshape(shape.outputs, -1), x, signs @ x.astype(np.float64).T


@pytest.mark.parametrize("activations", [AHEAD, LATE, STAGED])
@pytest.mark.parametrize(("rows", "stages"), [(64, 1), (32, 2), (16, 3)])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("exact", [True, False])
def test_a_block_s_warps_read_and_sum_all_that_is_theirs(
    numbers, monkeypatch, exact, tokens, rows, stages, activations
):
    # The second block of outputs, of which not all are there; shares of unlike length.
    shape = Shape(
        tokens=tokens,
        outputs=100,
        blocks=7,
        warps=8,
        rows=rows,
        stages=stages,
        activations=activations,
        exact=exact,
    )
    packed, x, wanted = products(np.random.default_rng(1), shape)
    memory = Memory(1 << 20)
    first = 64
    monkeypatch.setattr(mosaic_warp, "_first_row", lambda: np.full(32, first, np.uint32))
    addresses = [
        memory.place(array)
        for array in (
            x,
            packed,
            np.empty((stages, shape.warps, shape.slot_bytes), np.uint8),
            np.empty((shape.shares, ROWS, WIDTH * shape.columns), np.int32),
        )
    ]
    for warp in range(shape.warps):
        Machine(shape, warp, memory).run(*addresses)
    sums = memory.bytes[addresses[-1] :][: 4 * shape.shares * ROWS * WIDTH * shape.columns]
    sums = sums.view(np.int32 if exact else np.float32).reshape(shape.shares, ROWS, -1).sum(0)
    found = sums[: shape.outputs - first, :tokens]
    np.testing.assert_array_equal(found if exact else found / 2, wanted[first:])
