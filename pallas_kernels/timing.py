"""Times of functions of arrays, on whatever device they run."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.shapes import WARM_SECONDS

# Work that is queued in each timing, so that the device does not wait for the host.
QUEUED_SECONDS = 0.01
MOST_QUEUED = 64

Program = Callable[[Sequence[tuple[Any, ...]]], Any]


def compile_calls(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Program:
    """A program that calls `function` once with each set; outputs are computed in full."""
    # Under a jit of its own the function is lowered once, however many sets there are.
    once = jax.jit(function)
    return jax.jit(lambda sets: [once(*arguments) for arguments in sets]).lower(sets).compile()


def median_ms(
    function: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    *,
    repeats: int,
    program: Program | None = None,
) -> float:
    """Median time of one call, in milliseconds.

    As many runs of a program of calls are timed together as fill `QUEUED_SECONDS`, after a while in
    which the card comes to the clock that it keeps under such calls (`WARM_SECONDS`).

    Args:
      function: of arrays.
      sets: its arguments, in turn.
      repeats: timings the median is over.
      program: what `compile_calls` made of both, if it is there.

    Raises:
      ValueError: nothing to time.
    """
    if repeats < 1 or not sets:
        raise ValueError(
            f"median_ms needs repeats >= 1 and a set of inputs, got repeats={repeats}, "
            f"{len(sets)} sets"
        )
    program = compile_calls(function, sets) if program is None else program
    jax.block_until_ready(program(sets))
    alone = _seconds(program, sets, 1)
    queued = min(max(2, math.ceil(QUEUED_SECONDS / max(alone, 1e-9))), MOST_QUEUED)
    warm = 0.0 if jax.default_backend() == "cpu" else WARM_SECONDS
    while warm > 0:
        warm -= _seconds(program, sets, queued)
    times = [_seconds(program, sets, queued) / (queued * len(sets)) for _ in range(repeats)]
    return 1e3 * statistics.median(times)


def device_ms(program: Program, sets: Sequence[tuple[Any, ...]], *, runs: int = 10) -> float | None:
    """Median time of one call on a GPU: from its program's first kernel to the end of the last.

    Calls of a few microseconds wait for the host, which is what `median_ms` then measures. Here the
    profiler tells when kernels ran; each run of the program is waited for.

    Args:
      program: what `compile_calls` made.
      sets: its arguments.
      runs: of the program; the median is over them.

    Returns:
      Milliseconds; None where the profiler tells of no kernels.
    """
    jax.block_until_ready(program(sets))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(program(sets))
        kernels = [
            (event.start_ns, event.end_ns)
            for path in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            # Other lines show the same once more, by what it was for.
            if line.name.startswith("Stream")
            for event in line.events
        ]
    found = spans(kernels, runs)
    return None if found is None else 1e-6 * statistics.median(found) / len(sets)


def spans(kernels: Sequence[tuple[float, float]], runs: int) -> list[float] | None:
    """From the first start to the last end of each of `runs` equal runs.

    Args:
      kernels: (start, end) of all, in any order.
      runs: one after the other, of as many kernels each.

    Returns:
      None if there are no kernels, or not as many in each run.
    """
    if not kernels or len(kernels) % runs:
        return None
    ordered, many = sorted(kernels), len(kernels) // runs
    each = [ordered[start : start + many] for start in range(0, len(ordered), many)]
    return [max(end for _, end in run) - run[0][0] for run in each]


def _seconds(program: Program, sets: Sequence[tuple[Any, ...]], queued: int) -> float:
    start = time.perf_counter()
    outputs = None
    for _ in range(queued):
        outputs = program(sets)
    jax.block_until_ready(outputs)
    return time.perf_counter() - start
