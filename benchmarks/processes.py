"""Parts of a benchmark in processes of their own: their peaks are their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.machine import GIB, REPOSITORY

# An A10 shows 22.5 GiB; the driver's context and the libraries' code are beside JAX's pool.
CARD_BYTES = 22 * GIB


def run_process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdout: TextIO | None = None,
) -> tuple[float, float]:
    """Seconds and peak resident bytes of a command.

    Args:
      command: and its arguments.
      environment: added to this process's.
      stdout: where its output goes, if not to this process's.

    Raises:
      RuntimeError: it failed.
    """
    start = time.perf_counter()
    together = {**os.environ, **(environment or {})}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=together, stdout=stdout)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        # Ctrl-C or SIGTERM: nothing goes on that nobody waits for.
        process.terminate()
        process.wait()
        raise
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        # Of `python -m NAME ...` the module.
        name = " ".join(command[1:3]) if command[0] == sys.executable else command[0]
        raise RuntimeError(f"{name} failed: exit code {process.returncode}")
    # Linux tells kilobytes, macOS bytes.
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The figures that a module writes as JSON to the file that `--output` names.

    Args:
      module: what `python -m` runs.
      arguments: its further ones.
      environment: added to this process's.

    Returns:
      Its figures; "process_s" and "host_bytes" are the seconds and the peak resident bytes.

    Raises:
      RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", module, *arguments, "--output", str(output)]
        seconds, host = run_process(command, environment)
        figures = json.loads(output.read_text(encoding="utf-8"))
    return {**figures, "process_s": seconds, "host_bytes": host}


def compilation_cache(folder: Path | str) -> dict[str, str]:
    """Settings under which every compiled program is kept in a folder, however small."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def card_environment() -> dict[str, str]:
    """Settings under which JAX has no more device memory than a card of 24 GB; none without a GPU.

    Raises:
      RuntimeError: the device has less.
    """
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return memory_settings(int(told.split()[0]) * 2**20)


def memory_settings(total: int) -> dict[str, str]:
    """The environment for a device of `total` bytes.

    Raises:
      RuntimeError: that is less than a card of 24 GB has.
    """
    if total < CARD_BYTES:
        raise RuntimeError(f"the device has {total / GIB:.1f} GiB, a 24 GB card has more")
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        # Rounded down: the pool may not be larger than the card.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{int(1e4 * CARD_BYTES / total) / 1e4:.4f}",
    }


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, without those in folders below."""
    return sum(file.stat().st_size for file in folder.iterdir())
