"""Converts a full-size FLUX.1-dev transformer of random values, beside `cp` on the same disk.

    python -m benchmarks.convert_fullsize --folder /a/disk/with/50/GB

Makes a diffusers transformer folder (23.8 GB of bf16 in three shards) in `--folder`, then, in turn,
copies it with `cp -r` and converts it with `python -m convert`, each several times. Before each of
the two the source's pages are dropped from the page cache and everything written before is on the
disk; after each, the target is removed. `cp` returns while most of its copy is still in memory;
the conversion has every byte on the disk when it returns, so the time of `cp` with a `sync` after
it is given too. Peak memory is the peak resident set of the process (`wait4`), which counts its
buffers and libraries; files are read with `pread`, nothing is mapped.

Writes `benchmarks/results/convert_fullsize_<disk>.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer

from benchmarks.common import RESULTS, Figure, Peer, Result, package_versions
from convert import tables
from convert.plan import backward_plan
from convert.safetensors_write import write_component
from convert.tensors import Spec, total_bytes
from flux_jax.configs import FluxConfig

_SHARD_BYTES = 9_990_000_000
_PACKAGES = ("jax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy", "ml_dtypes")


class RandomTensors:
    """A reader of random finite bfloat16 values, different in every block."""

    def __init__(self, config: FluxConfig):
        table = tables.diffusers_map("transformer", config)
        plan = backward_plan(table, tables.our_shapes("transformer", config))
        bf16 = np.dtype(ml_dtypes.bfloat16)
        self.specs = {a.name: Spec(a.shape, bf16) for a in plan.assemblies}
        self._random = np.random.Generator(np.random.SFC64(0))

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        del name, row
        bits = out.reshape(-1).view(np.uint16)
        words = self._random.integers(0, 2**64, -(-bits.size // 4), np.uint64)
        # Without the exponent's highest bit, every value is finite and below 2.
        np.bitwise_and(words.view(np.uint16)[: bits.size], 0xBFFF, out=bits)


def make_source(folder: Path, config: FluxConfig, shard_bytes: int) -> int:
    """A diffusers transformer folder of random values; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    reader = RandomTensors(config)
    write_component(folder, tables.STEMS["transformer"], reader, shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(tables.config_to_hf("transformer", config)))
    return total_bytes(reader)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, after everything dirty is written."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak resident bytes of a command.

    Raises:
        RuntimeError: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with exit code {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(source: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round: `cp`, `cp` and sync, conversion; and the conversion's peak bytes."""
    measured: dict[str, list[float]] = {"cp": [], "cp_sync": [], "convert": [], "peak": []}
    target = folder / "target"
    for i in range(rounds):
        forget(source)
        seconds, _ = timed(["cp", "-r", str(source), str(target)])
        start = time.perf_counter()
        os.sync()
        measured["cp"].append(seconds)
        measured["cp_sync"].append(seconds + time.perf_counter() - start)
        shutil.rmtree(target)

        forget(source)
        command = [sys.executable, "-m", "convert", str(source), str(target), "--quiet"]
        seconds, peak = timed(command)
        measured["convert"].append(seconds)
        measured["peak"].append(peak)
        shutil.rmtree(target)
        print({key: round(values[i], 1) for key, values in measured.items()}, flush=True)
    return measured


def main(
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; 50 GB free.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of copy and conversion.")] = 3,
    depth: Annotated[int, typer.Option(min=1, help="Double blocks: 19 in full.")] = 19,
    disk: Annotated[str, typer.Option(help="What the disk is, for the result.")] = "local disk",
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = RESULTS,
) -> None:
    """Times a conversion at full size beside `cp` and writes the result file."""
    config = FluxConfig(depth=depth, depth_single_blocks=2 * depth)
    with tempfile.TemporaryDirectory(prefix="convert-fullsize-", dir=folder) as name:
        place = Path(name)
        source = place / "source"
        nbytes = make_source(source, config, _SHARD_BYTES)
        shards = len(list(source.glob("*.safetensors")))
        print(f"{nbytes / 1e9:.1f} GB in {shards} shards", flush=True)
        measured = compare(source, place, rounds)
    median = {key: statistics.median(values) for key, values in measured.items()}
    spread = {key: f"{min(values):.4g} to {max(values):.4g}" for key, values in measured.items()}
    cold = f"median of {rounds}, {{}} s; source not in the page cache"
    figures = {
        "size_gb": Figure(value=nbytes / 1e9, unit="GB", note=f"bf16, {shards} shards"),
        "seconds": Figure(
            value=median["convert"],
            unit="s",
            note=cold.format(spread["convert"]) + "; all of it on the disk at the end",
        ),
        "synced_seconds": Figure(
            value=median["convert"], unit="s", note="the same: it returns when all is on the disk"
        ),
        "ratio": Figure(
            value=median["convert"] / median["cp"], unit="x", note="conversion over cp, medians"
        ),
        "peak_gb": Figure(
            value=max(measured["peak"]) / 1e9,
            unit="GB",
            note="highest resident set of the conversion; nothing is mapped",
        ),
    }
    copied = {
        "seconds": Figure(
            value=median["cp"],
            unit="s",
            note=cold.format(spread["cp"]) + "; part of it still in memory at the end",
        ),
        "synced_seconds": Figure(
            value=median["cp_sync"], unit="s", note=f"with sync, {spread['cp_sync']} s"
        ),
    }
    peers = {"cp -r": Peer(versions={}, figures=copied)}
    result = Result(
        benchmark="convert_fullsize",
        device=disk,
        figures=figures,
        peers=peers,
        versions=package_versions(*_PACKAGES),
    )
    print(result.write(out))


if __name__ == "__main__":
    typer.run(main)
