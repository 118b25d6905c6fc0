"""The timer; no time is asserted."""

import jax.numpy as jnp
import pytest

from pallas_kernels import timing


def test_median(monkeypatch):
    # Start and end of three timings of two programs with two calls each.
    clock = iter([0.0, 4.0, 10.0, 30.0, 40.0, 48.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    sets = [(jnp.zeros(2),), (jnp.ones(2),)]
    assert timing.median_ms(lambda x: x + 1, sets, repeats=3) == 2000.0


def test_nothing_to_time():
    with pytest.raises(ValueError, match=r"needs repeats >= 1.* got repeats=0, 1 sets"):
        timing.median_ms(lambda x: x, [(jnp.zeros(1),)], repeats=0)


def test_inputs_are_rotated_past_the_cache():
    assert timing.input_sets(80e6) == 2
    assert timing.input_sets(50e6) == 4
    assert timing.input_sets(1e9) == 2
    assert timing.input_sets(1) == timing.MOST_SETS
