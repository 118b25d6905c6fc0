"""Row blocks on all cores: NumPy releases the interpreter during its loops."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Codes of a block: it and its intermediate values stay in a core's second-level cache.
BLOCK = 192 << 10


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ternary")


def over_rows(function: Callable[[slice], Any], rows: int, row_items: int) -> list[Any]:
    """`function(slice of rows)` for every block of rows, on all cores.

    Args:
      function: thread-safe; it gets disjoint slices that together are all rows.
      rows: their number.
      row_items: items of a row, for the size of a block.

    Returns:
      The results in the order of the rows.
    """
    step = max(1, BLOCK // max(1, row_items))
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    workers = os.cpu_count() or 1
    if workers == 1 or len(slices) < 2:
        return [function(part) for part in slices]
    # One task for each core: handing out every block would cost more than small blocks take.
    share = -(-len(slices) // workers)
    tasks = [slices[i : i + share] for i in range(0, len(slices), share)]

    def run(parts: list[slice]) -> list[Any]:
        return [function(part) for part in parts]

    return [result for done in _pool(workers).map(run, tasks) for result in done]
