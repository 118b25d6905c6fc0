"""From decoded arrays to bytes, and how far apart pictures are."""

from __future__ import annotations

import numpy as np
import pytest

from flux_jax import compare
from flux_jax.images import psnr, to_uint8, to_unit_range


def test_range_and_rounding():
    decoded = np.asarray([-3.0, -1.0, 0.0, 0.5, 1.0, 1.5], np.float32).reshape(1, 1, 6, 1)
    unit = to_unit_range(decoded)
    assert unit.dtype == np.float32
    np.testing.assert_array_equal(unit.ravel(), [0.0, 0.0, 0.5, 0.75, 1.0, 1.0])
    # 127.5 goes to the even one.
    np.testing.assert_array_equal(to_uint8(unit).ravel(), [0, 0, 128, 191, 255, 255])


def test_psnr_by_hand():
    black = np.zeros((3, 2, 2, 3), np.float32)
    other = black + np.float32([0.0, 0.1, 1.0]).reshape(3, 1, 1, 1)
    assert psnr(other, black) == pytest.approx([99.0, 20.0, 0.0], abs=1e-5)
    assert compare.psnr(np.full((2, 2, 3), 51, np.uint8), np.zeros((2, 2, 3))) == pytest.approx(
        -20 * np.log10(0.2)
    )
