"""Where overlapping tiles lie along one side of an image, and how they are blended."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of the fewest tiles that cover `length`, spread evenly.

    All tiles have the same size, `min(tile, length)`; the last ends where the side ends.

    Args:
      length: of the side.
      tile: length of a tile.
      overlap: least number of positions that neighbours share.

    Raises:
      ValueError: overlap not in [0, tile).
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and less than tile {tile}, got {overlap}")
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def blend_windows(starts: Sequence[int], tile: int) -> Float[np.ndarray, "N tile"]:
    """Weight of each tile at each of its positions; at every position of the side they sum to 1.

    A weight rises linearly across the overlap with the tile before and falls across that with the
    tile after; the ends of the side have no ramp.

    Args:
      starts: first position of each tile, ascending; neighbours overlap or touch.
      tile: length of a tile.
    """
    windows = np.ones((len(starts), tile))
    for i, (before, after) in enumerate(zip(starts, starts[1:], strict=False)):
        overlap = before + tile - after
        ramp = (np.arange(overlap) + 0.5) / max(overlap, 1)
        windows[i + 1, :overlap] *= ramp
        windows[i, tile - overlap :] *= ramp[::-1]
    # Where an overlap is more than half of a tile, three tiles meet: divide by what there is.
    total = np.zeros(starts[-1] + tile)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    spans = [total[start : start + tile] for start in starts]
    return (windows / np.stack(spans)).astype(np.float32)
