"""Converts a full-size FLUX.1-dev transformer of random values, beside `cp` on the same disk.

    python -m benchmarks.convert_fullsize --folder /a/disk/with/50/GB
    python -m benchmarks.convert_fullsize --tiny                         # anywhere, in a minute

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

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, Figure, OutOrNone, Peer, Result, Tiny, run
from benchmarks.machine import package_versions
from benchmarks.processes import run_process
from benchmarks.scaled_weights import write_component_folder
from flux_jax.configs import FluxConfig

_PACKAGES = ("jax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy", "ml_dtypes")


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, after everything dirty is written."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def compare(source: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round: `cp`, `cp` and sync, conversion; and the conversion's peak bytes."""
    measured: dict[str, list[float]] = {"cp": [], "cp_sync": [], "convert": [], "peak": []}
    target = folder / "target"
    for i in range(rounds):
        forget(source)
        seconds, _ = run_process(["cp", "-r", str(source), str(target)])
        start = time.perf_counter()
        os.sync()
        measured["cp"].append(seconds)
        measured["cp_sync"].append(seconds + time.perf_counter() - start)
        shutil.rmtree(target)

        forget(source)
        command = [sys.executable, "-m", "convert", str(source), str(target), "--quiet"]
        seconds, peak = run_process(command)
        measured["convert"].append(seconds)
        measured["peak"].append(peak)
        shutil.rmtree(target)
        print({key: round(values[i], 1) for key, values in measured.items()}, flush=True)
    return measured


def result_figures(
    measured: dict[str, list[float]], nbytes: int, shards: int
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """The conversion's figures, and those of `cp`, from what `compare` gives.

    Args:
      measured: of each round.
      nbytes, shards: of the source.
    """
    median = {key: statistics.median(values) for key, values in measured.items()}
    spread = {key: f"{min(values):.4g} to {max(values):.4g}" for key, values in measured.items()}
    rounds = len(measured["cp"])
    cold = f"median of {rounds}, {{}} s; source not in the page cache"
    converted = {
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
    return converted, copied


def main(
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; 50 GB free.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of copy and conversion.")] = 3,
    disk: Annotated[str, typer.Option(help="What the disk is, for the result.")] = "local disk",
    tiny: Tiny = False,
    out: OutOrNone = None,
) -> None:
    """Times a conversion at full size beside `cp` and writes the result file."""
    place = None if folder is None else folder.absolute()
    with tempfile.TemporaryDirectory(prefix="convert-fullsize-", dir=place) as name:
        config = FluxConfig.tiny() if tiny else FluxConfig.dev()
        nbytes = write_component_folder(Path(name), "transformer", config)
        source = Path(name) / "transformer"
        shards = len(list(source.glob("*.safetensors")))
        print(f"{nbytes / 1e9:.1f} GB in {shards} shards", flush=True)
        measured = compare(source, Path(name), rounds)
    converted, copied = result_figures(measured, nbytes, shards)
    result = Result(
        benchmark="convert_fullsize_tiny" if tiny else "convert_fullsize",
        device=disk,
        figures=converted,
        peers={"cp -r": Peer(versions={}, figures=copied)},
        versions=package_versions(*_PACKAGES),
    )
    if out is not None or not tiny:
        print(f"written: {result.write(out or RESULTS).name}")


if __name__ == "__main__":
    run(main)
