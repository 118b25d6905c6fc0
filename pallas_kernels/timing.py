"""Times of functions of arrays, on whatever device they run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

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

    As many runs of a program of calls are timed together as fill `QUEUED_SECONDS`.

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
    times = [_seconds(program, sets, queued) / (queued * len(sets)) for _ in range(repeats)]
    return 1e3 * statistics.median(times)


def _seconds(program: Program, sets: Sequence[tuple[Any, ...]], queued: int) -> float:
    start = time.perf_counter()
    outputs = None
    for _ in range(queued):
        outputs = program(sets)
    jax.block_until_ready(outputs)
    return time.perf_counter() - start
