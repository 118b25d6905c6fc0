"""Rounding, under `jit`, against NumPy's and ml_dtypes' conversions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rounding import rounded


def values():
    """Of all magnitudes, halves between float16's neighbours among them, subnormal ones too."""
    rng = np.random.default_rng(0)
    some = rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 18, 4000)
    steps = np.arange(-2100, 2100) * 2.0**-25
    edges = [0.0, -0.0, 65504, 65519, 65520, 65536, np.inf, -np.inf, 2.0**-14, 3e38, 1e-38]
    return np.concatenate((some, steps, edges)).astype(np.float32)


def check(dtype):
    x = values()
    with np.errstate(over="ignore"):
        want = x.astype(dtype).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: rounded(x, dtype))(x))
    np.testing.assert_array_equal(found, want)
    assert np.isnan(jax.jit(lambda x: rounded(x, dtype))(np.float32(np.nan)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_as_a_conversion_there_and_back(dtype):
    check(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_on_a_gpu(dtype):
    assert jax.default_backend() == "gpu"
    check(dtype)
