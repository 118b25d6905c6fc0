"""Jobs of several processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many fake devices, whose programs are those of a test.

    XLA's other flags stay: with more or less optimisation it rounds otherwise.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "device_count" not in flag]
    flags = [*kept, f"--xla_force_host_platform_device_count={count}"]
    return {**os.environ, "XLA_FLAGS": " ".join(flags)}


def start(command: Sequence[str], count: int, devices: int) -> list[subprocess.Popen[str]]:
    """The processes of one job, each with some fake devices; `--distributed` is added."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = {
        **with_devices(devices),
        "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "NUM_PROCESSES": str(count),
    }
    return [
        subprocess.Popen(
            [*command, "--distributed"],
            env={**plain, "PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(jobs: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for all; what each said on stderr."""
    try:
        said = [job.communicate(timeout=240)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs), "\n".join(said)
    return said
