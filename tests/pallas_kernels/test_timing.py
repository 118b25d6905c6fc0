"""The timer; no time is asserted."""

import jax.numpy as jnp
import pytest

from pallas_kernels import shapes, timing


def test_median(monkeypatch):
    # Start and end: of one program, which says that two fill the queue, and of three timings of
    # two programs with two calls each.
    clock = iter([0.0, 5.0, 10.0, 14.0, 20.0, 40.0, 50.0, 58.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "QUEUED_SECONDS", 10.0)
    sets = [(jnp.zeros(2),), (jnp.ones(2),)]
    assert timing.median_ms(lambda x: x + 1, sets, repeats=3) == 2000.0


@pytest.mark.parametrize(("alone", "queued"), [(1e-3, 10), (4e-3, 3), (1.0, 2), (1e-9, 64)])
def test_short_programs_are_queued_until_they_outlast_the_host(alone, queued, monkeypatch):
    runs, clock = [], iter([0.0, alone, 0.0, 1.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    timing.median_ms(lambda x: x, [(0,)], repeats=1, program=lambda sets: runs.append(sets))
    assert len(runs) == 1 + 1 + queued


def test_a_card_is_brought_to_its_own_clock_first(monkeypatch):
    """What runs before the first timing is not timed; a CPU keeps its clock."""
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.5)
    # One program alone; three times two while the card warms up, 0.2 s each; one timing of two.
    clock = iter([0.0, 1.0, *(0.0, 0.2) * 3, 0.0, 8.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.median_ms(lambda x: x, [(0,)], repeats=1, program=lambda sets: 0) == 4000.0


def test_every_set_is_multiplied():
    program = timing.compile_calls(lambda x, y: x * y, [(jnp.ones(2), 3.0), (jnp.ones(2), 4.0)])
    first, second = program([(jnp.ones(2), 5.0), (jnp.ones(2), 6.0)])
    assert first.tolist() == [5.0, 5.0]
    assert second.tolist() == [6.0, 6.0]


def test_nothing_to_time():
    with pytest.raises(ValueError, match=r"needs repeats >= 1.* got repeats=0, 1 sets"):
        timing.median_ms(lambda x: x, [(jnp.zeros(1),)], repeats=0)


def test_inputs_are_rotated_past_the_cache():
    assert shapes.input_sets(80e6) == 6
    assert shapes.input_sets(300e6) == 2
    assert shapes.input_sets(1e9) == 2
    assert shapes.input_sets(1) == shapes.ENOUGH_SETS


def test_runs_are_told_apart_by_their_kernels():
    kernels = [(100.0, 101.0), (0.0, 2.0), (3.0, 5.0), (102.0, 108.0)]
    assert timing.spans(kernels, runs=2) == [5.0, 8.0]
    assert timing.spans(kernels, runs=3) is None
    assert timing.spans([], runs=2) is None


def test_kernels_that_overlap_end_with_the_last():
    assert timing.spans([(0.0, 9.0), (1.0, 4.0)], runs=1) == [9.0]


def test_without_a_gpu_no_kernels_are_told():
    sets = [(jnp.ones(2),)]
    assert timing.device_ms(timing.compile_calls(lambda x: x, sets), sets, runs=2) is None
