import numpy as np
import pytest

from benchmarks import attention


def test_the_error_is_that_of_bfloat16():
    """Rounded results are half a step off; results of other inputs are not."""
    inputs = attention.random_inputs((1, 80, 2, 32), 0)
    q, k, v = (np.asarray(x, np.float64) for x in inputs)
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(32))
    exact = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
    assert attention.relative_error(exact, inputs) < 1e-12
    assert attention.relative_error(1.01 * exact, inputs) == pytest.approx(0.01)


def test_what_runs_is_measured():
    figures = attention.measure("xla", (1, 64, 2, 32), 1)
    assert set(figures) == {"xla/ms", "xla/tflops", "xla/error"}
    operations = 4 * 2 * 64**2 * 32
    rate = operations / (figures["xla/ms"].value / 1e3) / 1e12
    assert figures["xla/tflops"].value == pytest.approx(rate)
    assert 0 < figures["xla/error"].value < 0.01
