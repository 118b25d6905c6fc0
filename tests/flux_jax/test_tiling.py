"""Positions and weights of tiles."""

from __future__ import annotations

import numpy as np
import pytest

from flux_jax.tiling import blend_windows, tile_starts

LENGTHS = range(1, 41)
TILES = [(1, 0), (5, 0), (5, 2), (8, 0), (8, 4), (8, 7)]


@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_tiles_cover_the_side_with_the_overlap_asked_for(tile, overlap):
    for length in LENGTHS:
        starts = tile_starts(length, tile, overlap)
        size = min(tile, length)
        assert starts[0] == 0
        assert starts[-1] + size == length
        steps = np.diff(starts)
        assert np.all(steps > 0)
        assert np.all(size - steps >= overlap)


@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_weights_sum_to_one(tile, overlap):
    for length in LENGTHS:
        starts = tile_starts(length, tile, overlap)
        size = min(tile, length)
        total = np.zeros(length)
        for start, window in zip(starts, blend_windows(starts, size), strict=True):
            assert np.all(window >= 0)
            total[start : start + size] += window
        np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_weights_ramp_across_an_overlap():
    np.testing.assert_allclose(
        blend_windows([0, 4], 6), [[1, 1, 1, 1, 0.75, 0.25], [0.25, 0.75, 1, 1, 1, 1]]
    )


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_an_overlap_outside_the_tile_is_refused(overlap):
    with pytest.raises(ValueError, match=f"less than tile 8, got {overlap}"):
        tile_starts(20, 8, overlap)
