"""Draws how a step's time and memory grow with the picture and the batch, from a result file.

    python -m benchmarks.full_size_plot benchmarks/results/full_size_<device>.json

Needs matplotlib (`pip install -e ".[notebooks]"`). Writes docs/images/full_size.svg.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import Result, read_result, run
from benchmarks.machine import REPOSITORY
from flux_jax.errors import UserError

_NAME = re.compile(r"(.+), (\d+) pixels, batch (\d+)/(step_ms|planned_gib)")
_TITLES = {"step_ms": "one step, seconds", "planned_gib": "peak memory of the loop, GiB"}
_COLORS = {"bf16": "#8a8a8a", "ternary A8": "#1f6fb4"}

# By measure and kind: (side, batch) to value.
Points = dict[tuple[str, str], dict[tuple[int, int], float]]


def points(result: Result) -> Points:
    """What a result holds of growing pictures and batches.

    Raises:
      UserError: nothing of it.
    """
    found: Points = {}
    for name, figure in result.figures.items():
        match = _NAME.fullmatch(name)
        if match:
            kind, side, batch, measure = match.groups()
            value = figure.value / 1e3 if measure == "step_ms" else figure.value
            found.setdefault((measure, kind), {})[int(side), int(batch)] = value
    if not found:
        raise UserError("the result has no part 'scaling', nothing to draw")
    return found


def draw(result: Result, path: Path) -> None:
    """Two rows, time and memory; to the left by the picture's side, to the right by the batch."""
    import matplotlib

    matplotlib.use("Agg")
    # No date and no random names in the file: the same result gives the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "full_size"
    from matplotlib import pyplot

    found = points(result)
    main_side = next(
        (side for series in found.values() for side, batch in series if batch > 1),
        max(side for series in found.values() for side, _ in series),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), sharey="row", layout="constrained")
    for row, (measure, title) in enumerate(_TITLES.items()):
        for kind, color in _COLORS.items():
            series = found.get((measure, kind), {})
            by_side = sorted((side, v) for (side, batch), v in series.items() if batch == 1)
            by_batch = sorted(
                (batch, v) for (side, batch), v in series.items() if side == main_side
            )
            for column, line in enumerate((by_side, by_batch)):
                if line:
                    axes[row, column].plot(*zip(*line, strict=True), "o-", color=color, label=kind)
        axes[row, 0].set_ylabel(title)
    _finish(axes, main_side)
    figure.suptitle(f"FLUX.1-dev's shapes, {result.device}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _finish(axes: Any, main_side: int) -> None:
    labels = ("pixels of a side, batch 1", f"pictures of {main_side} x {main_side} at a time")
    for column, label in enumerate(labels):
        axes[1, column].set_xlabel(label)
        for row in (0, 1):
            ticks = sorted({x for line in axes[row, column].lines for x in line.get_xdata()})
            axes[row, column].set_xticks(ticks)
            axes[row, column].set_ylim(bottom=0)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()


def main(
    result: Annotated[Path, typer.Argument(help="A result file of benchmarks.full_size.")],
    out: Annotated[Path, typer.Option(help="The picture, SVG or PNG.")] = (
        REPOSITORY / "docs" / "images" / "full_size.svg"
    ),
) -> None:
    """Draws the plots."""
    draw(read_result(result), out)
    print(f"written: {out.name}")


if __name__ == "__main__":
    run(main)
