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


def input_sets(nbytes: float) -> int:
    """How many sets of inputs of `nbytes` to rotate."""
    return int(min(max(2, -(-ROTATED_BYTES // max(nbytes, 1))), MOST_SETS))


def median_ms(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], *, repeats: int, queued: int = 2
) -> float:
    """Median time of one call, in milliseconds.

    A program calls the function once with each set; some programs are queued at a time, so that the
    device does not wait for the host. Outputs are computed in full.

    Args:
      function: of arrays; it is compiled here.
      sets: its arguments, in turn.
      repeats: timings the median is over.
      queued: programs in each.

    Raises:
      ValueError: nothing to time.
    """
    if repeats < 1 or queued < 1 or not sets:
        raise ValueError(
            f"median_ms needs repeats >= 1, queued >= 1 and a set of inputs, got "
            f"repeats={repeats}, queued={queued}, {len(sets)} sets"
        )
    program = jax.jit(lambda sets: [function(*arguments) for arguments in sets])
    for _ in range(2):
        jax.block_until_ready(program(sets))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = None
        for _ in range(queued):
            outputs = program(sets)
        jax.block_until_ready(outputs)
        times.append((time.perf_counter() - start) / (queued * len(sets)))
        del outputs
    return 1e3 * statistics.median(times)
