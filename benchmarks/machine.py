"""What a benchmark ran on: the command, the commit, the machine, its devices and packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30

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


def command_line() -> str:
    """The command of this process as one would type it, without the paths of this machine."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    program = f"python -m {name}" if spec else f"python {name}"
    flags = os.environ.get("XLA_FLAGS")
    setting = [f"XLA_FLAGS={shlex.quote(flags)}"] if flags else []
    # An absolute path says where this machine keeps things, not what was run.
    arguments = (re.sub(r"(^|=)/(?:.*/)?", r"\1", one) for one in sys.argv[1:])
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
        hardware["memory_gib"] = round(size / GIB, 1)
    return hardware


def device_figures() -> dict[str, Any]:
    """JAX's first device, and its memory where it tells it.

    Returns:
      "device": the accelerator's kind, or the processor's name; "platform"; "peak_bytes" and
      "limit_bytes", None where they are not told.
    """
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    on_cpu = device.platform == "cpu"
    return {
        "device": _cpu_name() if on_cpu else device.device_kind,
        "platform": device.platform,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
    }


def package_versions(*names: str) -> dict[str, str]:
    """Versions of Python and of those packages in `names` that are here.

    By default the JAX ones, the CUDA libraries among them.
    """
    versions = {"python": platform.python_version()}
    for name in names or _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


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
