"""The timer and the arithmetic around it; no time is asserted."""

import jax.numpy as jnp
import pytest

from pallas_kernels import bench, timing
from pallas_kernels.bench import Row


def test_median(monkeypatch):
    # Start and end of three timings of two programs with two calls each.
    clock = iter([0.0, 4.0, 10.0, 30.0, 40.0, 48.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    sets = [(jnp.zeros(2),), (jnp.ones(2),)]
    assert timing.median_ms(lambda x: x + 1, sets, repeats=3) == 2000.0


def test_nothing_to_time():
    with pytest.raises(ValueError, match=r"needs repeats >= 1.* got repeats=0, queued=2, 1 sets"):
        timing.median_ms(lambda x: x, [(jnp.zeros(1),)], repeats=0)


def test_inputs_are_rotated_past_the_cache():
    assert timing.input_sets(80e6) == 2
    assert timing.input_sets(50e6) == 4
    assert timing.input_sets(1e9) == 2
    assert timing.input_sets(1) == timing.MOST_SETS


def row(what, backend, ms):
    return Row(m=1, k=2, n=3, what=what, backend=backend, ms=ms, tops=1.0)


def test_ratios():
    rows = [
        row(bench.BF16_DOT, "xla", 4.0),
        row(bench.INT8_DOT, "xla", 2.0),
        row(bench.A8, "mosaic", 2.0),
        row(bench.A8_PRODUCT, "mosaic", 1.0),
    ]
    assert bench.ratio_to_dense(rows, bench.A8, "mosaic") == {(1, 2, 3): 2.0}
    assert bench.ratio_to_dense(rows, bench.A8_PRODUCT, "mosaic") == {(1, 2, 3): 2.0}
    assert bench.ratio_to_dense(rows, bench.A8, "triton") == {}
    assert [line.rstrip().endswith("2.00x") for line in bench.table(rows)[1:]] == [
        False,
        False,
        True,
        True,
    ]
