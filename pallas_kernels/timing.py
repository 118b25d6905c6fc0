"""Times of functions of arrays, on whatever device they run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# Inputs are rotated, so that what one call read is gone from the cache when its turn comes again.
ROTATED_BYTES = 160e6
MOST_SETS = 12
# Programs in flight in each timing, so that the device does not wait for the host.
QUEUED = 2


def input_sets(nbytes: float) -> int:
    """How many sets of inputs of `nbytes` to rotate."""
    return int(min(max(2, -(-ROTATED_BYTES // max(nbytes, 1))), MOST_SETS))


def median_ms(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], *, repeats: int
) -> float:
    """Median time of one call, in milliseconds.

    A program calls the function once with each set; `QUEUED` of them are timed together. Outputs
    are computed in full.

    Args:
      function: of arrays; it is compiled here.
      sets: its arguments, in turn.
      repeats: timings the median is over.

    Raises:
      ValueError: nothing to time.
    """
    if repeats < 1 or not sets:
        raise ValueError(
            f"median_ms needs repeats >= 1 and a set of inputs, got repeats={repeats}, "
            f"{len(sets)} sets"
        )
    program = jax.jit(lambda sets: [function(*arguments) for arguments in sets])
    for _ in range(2):
        jax.block_until_ready(program(sets))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = None
        for _ in range(QUEUED):
            outputs = program(sets)
        jax.block_until_ready(outputs)
        times.append((time.perf_counter() - start) / (QUEUED * len(sets)))
        del outputs
    return 1e3 * statistics.median(times)
