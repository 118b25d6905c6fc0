"""The packer for stored weights against the JAX quantiser."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flux_jax.errors import UserError
from ternary.config import GRANULARITIES, scale_shape
from ternary.quantize import dequantize, fit_scale, ternary_signs
from ternary.storage.base3 import unpack_base3
from ternary.storage.pack import quantize_weight

DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))


def weight(dtype, rows=700, columns=300):
    values = np.random.default_rng(0).standard_normal((rows, columns)) * 0.02
    return values.astype(np.float32).astype(dtype)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_quantiser(dtype, granularity, steps):
    w = weight(dtype)
    done = quantize_weight(w, granularity, steps)
    assert done.scale.dtype == np.float16
    assert done.scale.shape == scale_shape(granularity, *w.shape)
    expected = np.asarray(fit_scale(jnp.asarray(w), granularity, steps))
    # The same sums in another order: at most the next float16.
    np.testing.assert_allclose(done.scale.astype(np.float32), expected, rtol=2**-10)
    scale = jnp.asarray(done.scale).astype(jnp.float32)
    signs = ternary_signs(jnp.asarray(w), scale)
    codes = unpack_base3(done.data, w.shape[1])
    np.testing.assert_array_equal(codes, np.asarray(signs) + 1)
    dense = np.asarray(dequantize(signs, scale), np.float64)
    wide = w.astype(np.float64)
    error = np.linalg.norm(wide - dense) / np.linalg.norm(wide)
    assert done.relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_at_the_threshold(dtype):
    """Values at, just below and just above half the scale, of both signs."""
    half = np.float32(0.0625)
    step = np.float32(2.0**-11)
    row = np.asarray([half, half + step, half - step, -half, -half - step, -half + step, 0.0, -0.0])
    # The mean of the row is its scale: a weight that makes it 0.125.
    filler = 8 * (0.125 * 9 - np.abs(row).sum()) / 8
    w = np.asarray([[*row, filler]], np.float32).astype(dtype)
    done = quantize_weight(w, "tensor")
    assert float(done.scale) == pytest.approx(0.125)
    expected = np.asarray(ternary_signs(jnp.asarray(w), jnp.asarray(done.scale, jnp.float32))) + 1
    np.testing.assert_array_equal(unpack_base3(done.data, 9), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_of_zeros(granularity):
    w = weight(DTYPES[0])
    w[3] = 0
    done = quantize_weight(w, granularity, 2)
    assert (unpack_base3(done.data, 300)[3] == 1).all()
    empty = quantize_weight(np.zeros((4, 300), DTYPES[0]), granularity, 1)
    assert empty.relative_error == 0
    assert not empty.scale.any()


def test_weights_below_float16_become_zero():
    w = np.full((2, 128), 1e-12, np.float32)
    done = quantize_weight(w, "channel")
    assert not done.scale.any()
    assert (unpack_base3(done.data, 128) == 1).all()
    assert done.relative_error == pytest.approx(1)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_that_no_scale_can_hold_are_refused(granularity, value, steps):
    w = weight(np.dtype(np.float32))
    w[5, 7] = value
    with pytest.raises(UserError, match="tensor `double_blocks.0.x` has values that are not fin"):
        quantize_weight(w, granularity, steps, what="double_blocks.0.x")
