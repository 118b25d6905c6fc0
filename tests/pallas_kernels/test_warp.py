"""A warp's program for the fewest rows, in NumPy in place of machine code.

Interpret mode runs a plain twin of the kernel. Here its own code decides what is read, which
operands meet, and what is made of the sums (`lanes`).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mosaic_lane, mosaic_mma
from pallas_kernels.mosaic_direct import scratch_types
from pallas_kernels.mosaic_mma import PLANES, WIDTH, WORDS, Shape
from pallas_kernels.mosaic_warp import Scratch
from pallas_kernels.tiles import AHEAD, LATE, SHARED, DirectTile
from tests.pallas_kernels.emitted import on_words
from tests.pallas_kernels.lanes import LANES, QUARTER, ROW, Lanes, Memory, run_block, words_of


@pytest.fixture
def numbers(monkeypatch):
    """The decoding of words as it is emitted, run in NumPy."""
    for name in ("sign_word", "top_bits", "masked"):
        monkeypatch.setattr(mosaic_mma, name, on_words(getattr(mosaic_mma, name)))


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_a_warp_s_sums_are_the_product(numbers, exact, tokens, rows):
    random = np.random.default_rng(0)
    shape = Shape(
        tokens=tokens,
        outputs=64,
        tile=64,
        blocks=2,
        warps=4,
        rows=rows,
        stages=2,
        activations=AHEAD,
        exact=exact,
    )
    warp = Lanes(shape)
    sums = [np.zeros(32, np.int32 if exact else np.float32)] * (
        4 * shape.columns * (shape.sets * shape.tiles + int(exact))
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
        for plane in range(PLANES):
            some = [
                x[np.minimum(ROW + WIDTH * column, tokens - 1), plane].reshape(32, 4, 16)
                for column in range(shape.columns)
            ]
            activations.append([word for each in some for word in words_of(each[LANES, QUARTER]).T])
        assert [len(words) for words in activations] == [shape.plane_words] * PLANES
        sums = warp.multiply(read, activations.__getitem__, sums)
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


@pytest.mark.parametrize("activations", [AHEAD, LATE, SHARED])
@pytest.mark.parametrize(
    "sizes",
    [
        {"groups": 2, "rows": 64, "stages": 1},
        {"groups": 2, "rows": 16, "stages": 3},
        # Neither the outputs nor the inputs come out even.
        {"groups": 3, "rows": 48, "outputs": 144, "stages": 2},
        {"groups": 3, "rows": 80, "outputs": 80, "stages": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("exact", "tokens"),
    [
        (True, 1),
        (False, 9),
        pytest.param(True, 9, marks=pytest.mark.long),
        pytest.param(False, 1, marks=pytest.mark.long),
    ],
)
def test_a_block_s_warps_read_and_sum_all_that_is_theirs(
    numbers, monkeypatch, exact, tokens, sizes, activations
):
    tile = DirectTile(**sizes, activations=activations)
    shape = Shape(
        tokens=tokens,
        outputs=200,
        tile=tile.outputs,
        blocks=7,
        warps=4 * tile.groups,
        rows=tile.rows,
        stages=tile.stages,
        activations=activations,
        exact=exact,
    )
    packed, x, wanted = products(np.random.default_rng(1), shape)
    memory, first = Memory(1 << 20), 40
    monkeypatch.setattr(mosaic_lane, "first_output", lambda shape: np.full(32, first, np.uint32))
    empty = Scratch(*(np.empty(each.shape, each.dtype) for each in scratch_types(shape)))
    scratch = Scratch(*(memory.place(array) for array in empty))
    run_block(shape, memory, memory.place(x), memory.place(packed), scratch)
    sums = memory.bytes[scratch.sums :][: empty.sums.nbytes].view(empty.sums.dtype)
    found = sums.reshape(empty.sums.shape).sum(0)[:, :tokens]
    assert len(found) == tile.outputs
    wanted = wanted[first : first + tile.outputs]
    np.testing.assert_array_equal(found if exact else found / 2, wanted)
