"""A run's folder as it lies there: finished, still growing, killed, or with parts missing."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from flux_jax.errors import UserError
from ternary.distillation.run_config import load_yaml

# The columns of one table are of one length, those of two tables need not be.
Columns = dict[str, Float[np.ndarray, " _"]]

# Without these nobody knows where a picture of a grid is, and of what.
_LEGEND = {"height", "width", "gap", "shown"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One drawing of the held-out prompts.

    Attributes:
      step: at which it was drawn.
      picture: the grid, teacher | student.
      legend: what it shows, as the run wrote it beside the picture.
    """

    step: int
    picture: Path
    legend: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What was found in a run's folder.

    Attributes:
      folder: of the run.
      settings: `run.yaml`; empty where it is missing.
      metrics, held_out: columns of the two tables by name, `step` among them; cells that are empty
        or no number are NaN. Empty where the table is missing.
      written: when `metrics.csv` was last written to.
      samples: by step.
      checkpoints: steps.
      missing: sentences on what is not there or cannot be read.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: Columns
    held_out: Columns
    written: datetime.datetime | None
    samples: tuple[Sample, ...]
    checkpoints: tuple[int, ...]
    missing: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The last step that was reported, 0 without any."""
        steps = self.metrics.get("step", np.zeros(0))
        return int(steps[-1]) if len(steps) else 0

    @property
    def wanted(self) -> int | None:
        """Steps that the settings ask for; None if they do not say."""
        steps = self.part("distill").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def student(self) -> Path | None:
        """The student that the run wrote, if it did."""
        folder = self.folder / "student"
        return folder if (folder / "transformer" / "config.json").is_file() else None

    def part(self, name: str) -> dict[str, Any]:
        """Settings of one inner config, or nothing."""
        value = self.settings.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def finished(self) -> bool:
        """Whether the last step was taken and the student written."""
        return self.student is not None and self.steps == self.wanted


def read_run(folder: Path) -> Run:
    """Read what there is of a run; a part that is missing or broken is named, not refused.

    Raises:
      UserError: nothing of a run is there.
    """
    if not (folder / "run.yaml").is_file() and not (folder / "metrics.csv").is_file():
        found = "no such folder" if not folder.is_dir() else "it has no run.yaml and no metrics.csv"
        raise UserError(f"{folder} holds no distillation run: {found}")
    missing: list[str] = []
    settings = _settings(folder / "run.yaml", missing)
    metrics = _columns(folder / "metrics.csv", missing)
    held_out = _columns(folder / "held_out.csv", missing)
    written = None
    if metrics:
        seconds = (folder / "metrics.csv").stat().st_mtime
        written = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return Run(
        folder=folder,
        settings=settings,
        metrics=metrics,
        held_out=held_out,
        written=written,
        samples=_samples(folder / "samples", missing),
        checkpoints=tuple(sorted(_numbers(folder / "checkpoints"))),
        missing=tuple(missing),
    )


def _settings(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text("utf-8"))
    except FileNotFoundError:
        missing.append("run.yaml is missing: the settings are not known.")
        return {}
    except (OSError, ValueError):
        missing.append("run.yaml cannot be read: the settings are not known.")
        return {}
    if not isinstance(content, dict):
        missing.append("run.yaml holds no settings.")
        return {}
    return content


def _columns(path: Path, missing: list[str]) -> Columns:
    """A table's columns; rows that were cut off, or lie out of order, are left out."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            names, *rows = list(csv.reader(file)) or [[]]
    except OSError:
        missing.append(f"{path.name} is missing.")
        return {}
    except csv.Error:
        missing.append(f"{path.name} is no table.")
        return {}
    kept: list[list[float]] = []
    for row in rows:
        if row and len(row) == len(names) and row[0].isdecimal():
            values = [_number(cell) for cell in row]
            if not kept or values[0] > kept[-1][0]:
                kept.append(values)
    if not kept:
        missing.append(f"{path.name} has no row yet.")
        return {}
    return dict(zip(names, np.array(kept, float).T, strict=True))


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _samples(folder: Path, missing: list[str]) -> tuple[Sample, ...]:
    found, untold = [], []
    for picture in sorted(folder.glob("step_*.png")):
        step = picture.stem.removeprefix("step_")
        if not step.isdecimal():
            continue
        legend = _legend(picture.with_suffix(".json"))
        if legend is None:
            untold.append(picture.name)
        else:
            found.append(Sample(step=int(step), picture=picture, legend=legend))
    if untold:
        more = f" and {len(untold) - 1} more" if len(untold) > 1 else ""
        said = "the .json beside it is missing or incomplete."
        missing.append(f"samples/{untold[0]}{more} cannot be shown: {said}")
    elif not found:
        missing.append("samples/ has no pictures.")
    return tuple(found)


def _legend(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(content, dict) and content.keys() >= _LEGEND
    return content if whole else None


def _numbers(folder: Path) -> list[int]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return [int(entry.name) for entry in entries if entry.name.isdecimal()]


def finite(values: Float[np.ndarray, " N"] | None) -> Float[np.ndarray, " M"]:
    """The finite values of a column; none of a column that is missing."""
    return np.zeros(0) if values is None else values[np.isfinite(values)]
