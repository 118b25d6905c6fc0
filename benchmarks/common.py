"""What every benchmark shares: the result file, the timer, and options of its command.

A result file is `benchmarks/results/<benchmark>_<device>.json`:

    {
      "schema": 1,
      "benchmark": "transformer_step",          # also the first part of the file name
      "device": "NVIDIA H200",                  # what was measured: an accelerator, a CPU or a disk
      "date": "2026-01-31",
      "command": "python -m benchmarks.transformer_step --peers",
      "commit": "3f2c…" | "3f2c… with changes" | "unknown",
      "hardware": {"gpu": …, "driver": …, "cpu": …, "cpu_cores": …, "memory_gib": …},
      "versions": {"python": …, "jax": …, …},
      "figures": {"step_ms": {"value": 1.0, "unit": "ms", "note": ""}, …},
      "peers": {"diffusers, eager": {"versions": {…}, "figures": {…}}, …}
    }

Figures are numbers with a unit; a peer's figures come from the same run, on the same machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import (
    REPOSITORY,
    command_line,
    describe_hardware,
    git_commit,
    package_versions,
)
from pallas_kernels.errors import UserError, exit_on_user_error
from pallas_kernels.files import write_whole

SCHEMA_VERSION = 1
RESULTS = REPOSITORY / "benchmarks" / "results"

# Options that several benchmarks have.
Out = Annotated[Path, typer.Option(help="Folder of the result file.")]
OutOrNone = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the result file.", show_default="benchmarks/results; for a trial none"
    ),
]
Commit = Annotated[str | None, typer.Option(help="Where .git is absent: the commit.")]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="At the shipped model's size, to try the command.")
]


class ResultError(UserError):
    """A result file is absent, or does not follow the schema."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured or computed number.

    Attributes:
      value: a finite number.
      unit: "ms", "s", "GB" (1e9 bytes), "GiB" (2**30 bytes), "TFLOP/s", "x", ...
      note: how it was obtained, when the name does not say.
    """

    value: float
    unit: str
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ResultError(f"a figure's value must be a number, got {self.value!r}")
        if not math.isfinite(self.value):
            raise ResultError(f"a figure's value must be finite, got {self.value!r}")
        if not self.unit:
            raise ResultError('a figure needs a unit (use "count" or "x" for pure numbers)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """Another program's figures, from the same run on the same machine."""

    versions: Mapping[str, str]
    figures: Mapping[str, Figure]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One run of one benchmark; the fields are those of the JSON file (see the module's text)."""

    benchmark: str
    device: str
    figures: Mapping[str, Figure]
    peers: Mapping[str, Peer] = dataclasses.field(default_factory=dict)
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())
    command: str = dataclasses.field(default_factory=command_line)
    commit: str = dataclasses.field(default_factory=git_commit)
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=describe_hardware)
    versions: Mapping[str, str] = dataclasses.field(default_factory=package_versions)

    @property
    def file_name(self) -> str:
        """`<benchmark>_<device>.json`, the device in lower case with dashes."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{self.benchmark}_{device}.json"

    def write(self, directory: Path = RESULTS) -> Path:
        """Writes the result file, replacing the one of an earlier run. Returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / self.file_name
        data = {"schema": SCHEMA_VERSION, **_rounded(dataclasses.asdict(self))}
        # Whole or not at all: it may hold what earlier runs measured.
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text)
        return path


def read_result(path: Path) -> Result:
    """Reads a result file.

    Raises:
      ResultError: there is no such file, or it is not JSON of this schema; the message names the
        file and the field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ResultError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA_VERSION:
        raise ResultError(
            f'{path}: expected "schema": {SCHEMA_VERSION}; run the benchmark again to rewrite it'
        )
    expected = {field.name for field in dataclasses.fields(Result)}
    if set(data) != expected:
        raise ResultError(
            f"{path}: missing fields {sorted(expected - set(data))}, "
            f"unknown fields {sorted(set(data) - expected)}"
        )
    try:
        figures = {name: Figure(**figure) for name, figure in data.pop("figures").items()}
        peers = {
            name: Peer(
                versions=peer["versions"],
                figures={key: Figure(**figure) for key, figure in peer["figures"].items()},
            )
            for name, peer in data.pop("peers").items()
        }
    except (AttributeError, KeyError, TypeError, ResultError) as error:
        raise ResultError(f"{path}: a figure or a peer is malformed ({error})") from error
    return Result(figures=figures, peers=peers, **data)


def results_folder(out: Path | None, trial: Mapping[str, bool]) -> Path | None:
    """Where a result file goes, if anywhere; a trial that names no folder is told so in one line.

    What lies in `benchmarks/results` is published under its benchmark's name: a smaller run, or one
    of other settings, must not take its place.

    Args:
      out: the folder that was asked for.
      trial: options that make another run of the benchmark, by name, and whether they are given.
    """
    given = [name for name, is_given in trial.items() if is_given]
    if out is None and given:
        print(f"no result file is written with {' and '.join(given)}, unless --out FOLDER is given")
        return None
    return RESULTS if out is None else out


# Steps queued before the clock is read, for ours and for the peers: a sampler does not wait for one
# step before it launches the next.
QUEUED_STEPS = 4


def median_seconds(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    wait: Callable[[Any], Any],
    repeats: int,
    warmup: int = 3,
    calls: int = 1,
) -> float:
    """Median time of one call of `function`, in seconds.

    Args:
      function: what is timed.
      inputs: argument tuples, used in turn: one set over and over would measure the cache.
      wait: called with the last output, returns when the work is done (`jax.block_until_ready`).
      repeats: how many timings the median is over.
      warmup: untimed calls before them.
      calls: calls queued per timing, as a loop queues its steps; their mean counts once.
    """
    if repeats < 1 or calls < 1 or not inputs:
        raise ValueError(
            f"median_seconds needs repeats >= 1, calls >= 1 and an input set, "
            f"got repeats={repeats}, calls={calls}, {len(inputs)} input sets"
        )
    count = 0
    for _ in range(warmup):
        wait(function(*inputs[count % len(inputs)]))
        count += 1
    timings = []
    for _ in range(repeats):
        start = time.perf_counter()
        output = None
        for _ in range(calls):
            output = function(*inputs[count % len(inputs)])
            count += 1
        wait(output)
        timings.append((time.perf_counter() - start) / calls)
    return statistics.median(timings)


def found_by(pattern: str | None, names: Sequence[str]) -> list[str]:
    """The names in which a regular expression is found; all of them without one.

    Raises:
      UserError: it is found in none, or is no regular expression.
    """
    try:
        found = [name for name in names if pattern is None or re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--only {pattern}: no regular expression ({error})") from error
    if not found:
        raise UserError(f"--only {pattern} finds none of {', '.join(names)}")
    return found


def run(main: Callable[..., None]) -> None:
    """`main` as a command; what its user can mend is one line, and exit code 2."""
    with exit_on_user_error():
        typer.run(main)


def _rounded(data: Any) -> Any:
    """Floats to six significant digits: the rest is noise that would fill the diffs."""
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return float(f"{data:.6g}") if isinstance(data, float) else data
