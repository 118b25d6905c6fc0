"""What every benchmark shares: the result file, the description of the machine, and the timer.

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

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cublas",
)


class ResultError(ValueError):
    """A result file does not follow the schema."""


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
    command: str = dataclasses.field(default_factory=lambda: command_line())
    commit: str = dataclasses.field(default_factory=lambda: git_commit())
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=lambda: describe_hardware())
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: package_versions())

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
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def read_result(path: Path) -> Result:
    """Reads a result file.

    Raises:
        ResultError: the file is not JSON of this schema; the message names the file and the field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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


def command_line() -> str:
    """The command of this process as one would type it, without the paths of this machine."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    program = f"python -m {name}" if spec else f"python {name}"
    flags = os.environ.get("XLA_FLAGS")
    setting = [f"XLA_FLAGS={shlex.quote(flags)}"] if flags else []
    # An absolute path says where this machine keeps things, not what was run.
    arguments = (Path(one).name if one.startswith("/") else one for one in sys.argv[1:])
    return " ".join([*setting, program, *map(shlex.quote, arguments)])


def git_commit() -> str:
    """The commit the code was at: "<sha>", "<sha> with changes" or "unknown" outside a checkout."""
    commit = _run("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    # A result file that is being replaced is not a change of the code.
    status = _run(
        "git", "-C", str(REPOSITORY), "status", "--porcelain", "--", ".", ":!benchmarks/results"
    )
    return f"{commit} with changes" if status else commit


def describe_hardware() -> dict[str, Any]:
    """GPU and driver (where `nvidia-smi` answers), CPU, cores and memory of this machine."""
    hardware: dict[str, Any] = {}
    gpus = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if gpus:
        rows = [row.split(", ") for row in gpus.splitlines()]
        hardware["gpu"] = rows[0][0]
        hardware["gpu_count"] = len(rows)
        hardware["driver"] = rows[0][-1]
    hardware["cpu"] = _cpu_name()
    hardware["cpu_cores"] = os.cpu_count() or 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        hardware["memory_gib"] = round(size / 2**30, 1)
    return hardware


def package_versions(*names: str) -> dict[str, str]:
    """Versions of Python and of those packages in `names` that are here.

    By default the JAX ones, the CUDA libraries among them.
    """
    versions = {"python": platform.python_version()}
    for name in names or _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _rounded(data: Any) -> Any:
    """Floats to six significant digits: the rest is noise that would fill the diffs."""
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return float(f"{data:.6g}") if isinstance(data, float) else data


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def device_figures() -> dict[str, Any]:
    """Device, and its peak and its limit where it tells them."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
    }
