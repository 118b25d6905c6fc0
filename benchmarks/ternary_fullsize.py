"""FLUX.1-dev's shapes through the ternary tools: quantise, calibrate two blocks, load, one step.

    python -m benchmarks.ternary_fullsize --work /a/disk/with/35/GB    # one GPU, 64 GB of memory
    python -m benchmarks.ternary_fullsize --size tiny                  # anywhere, in a minute
    python -m benchmarks.ternary_fullsize --work /a/disk/with/30/GB --size cpu    # 8 GB of memory

Random bf16 weights of a trained model's scale (23.8 GB), made here. Each stage is a process of its
own, so that its peaks are its own; host memory is the peak resident set (`wait4`).

- quantize: `python -m ternary quantize`, a scale per output, all of it on the CPU.
- calibrate: one double and one single block at 1024 x 1024 (4096 image and 512 text tokens), the
  others rounded, and the whole ternary checkpoint written. On a GPU the device's memory is capped
  to what a card of 24 GB leaves to a program: `XLA_PYTHON_CLIENT_MEM_FRACTION` is `CARD_BYTES` over
  the memory that `nvidia-smi` tells, and `XLA_PYTHON_CLIENT_PREALLOCATE=true` makes that pool all
  there is: a byte more is an error, not a figure.
- load: the ternary checkpoint onto the device, uncapped.
- With `--size cpu` nothing is calibrated: what is loaded is what was rounded, and a step is one of
  256 x 256 pixels.
- step: the pipeline's denoising loop, batch 1, plain JAX; the first step compiles.

On paper, the device holds while a double block (340 M weights) is trained with AdamW in float32:
latent weights 1.36 GB, moments 2.72, gradients 1.36, their sum over the samples of a batch 1.36,
signs and casts about 1, one sample's activations about 2, the teacher's block and the next one 1.36
(bf16), two streams of a batch 0.2: 11 to 12 GB of the 24. While the teacher is sampled: two blocks
1.36 GB, 28 MB for each sample, one batch's activations.

Writes `benchmarks/results/ternary_fullsize_<device>.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from benchmarks.common import REPOSITORY, RESULTS, Figure, Result, describe_hardware
from benchmarks.ternary_fullsize_worker import SIZES

GIB = 2**30
# An A10 shows 22.5 GiB; the driver's context and the libraries' code are beside JAX's pool.
CARD_BYTES = 22 * GIB


def run_process(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
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
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} failed: exit code {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_stage(
    stage: str, size: str, work: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """A stage's figures, with the seconds and the peak host bytes of its process."""
    print(f"{stage} ...", flush=True)
    output = work / f"{stage}.json"
    worker = [sys.executable, "-m", "benchmarks.ternary_fullsize_worker", stage]
    places = ["--work", str(work), "--output", str(output), "--size", size]
    seconds, host = run_process([*worker, *places], environment)
    figures = json.loads(output.read_text(encoding="utf-8"))
    print(f"{stage}: {seconds:.1f} s, {host / 1e9:.1f} GB on the host", flush=True)
    return {**figures, "process_s": seconds, "host_bytes": host}


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
    """The environment for a device of so many bytes."""
    if total < CARD_BYTES:
        raise RuntimeError(f"the device has {total / GIB:.1f} GiB, a 24 GB card has more")
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        # Rounded down: the pool may not be larger than the card.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{int(1e4 * CARD_BYTES / total) / 1e4:.4f}",
    }


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(size: str, work: Path) -> dict[str, Any]:
    """All stages' figures by stage."""
    found = {"source": run_stage("source", size, work)}
    print("quantize ...", flush=True)
    command = [sys.executable, "-m", "ternary", "quantize", str(work / "teacher")]
    # The rounding needs no device.
    environment = {"JAX_PLATFORMS": "cpu"}
    seconds, host = run_process([*command, str(work / "rounded"), "--quiet"], environment)
    stored = folder_bytes(work / "rounded" / "transformer")
    found["quantize"] = {"process_s": seconds, "host_bytes": host, "stored_bytes": stored}
    print(f"quantize: {seconds:.1f} s, {stored / 1e9:.2f} GB stored", flush=True)
    if SIZES[size].blocks:
        shutil.rmtree(work / "rounded")
        found["calibrate"] = run_stage("calibrate", size, work, card_environment())
        found["calibrate"]["stored_bytes"] = folder_bytes(work / "calibrated" / "transformer")
    shutil.rmtree(work / "teacher")
    for stage in ("load", "step"):
        found[stage] = run_stage(stage, size, work)
    return found


def result_figures(found: dict[str, Any]) -> dict[str, Figure]:
    """The figures of the result file, from the stages'."""
    quantize, load, dense = found["quantize"], found["load"], found["source"]["source_bytes"]
    figures = {
        "source_gb": Figure(value=dense / 1e9, unit="GB", note="bf16, random"),
        "quantize_s": Figure(
            value=quantize["process_s"], unit="s", note="the whole process; source not in memory"
        ),
        "quantize_gb_per_s": Figure(
            value=dense / quantize["process_s"] / 1e9, unit="GB/s", note="of bf16 input"
        ),
        "stored_gb": Figure(value=quantize["stored_bytes"] / 1e9, unit="GB", note="transformer"),
        "ratio": Figure(
            value=dense / quantize["stored_bytes"], unit="x", note="bf16 over ternary, on disk"
        ),
        "ternary_share": Figure(
            value=load["ternary_fraction"], unit="share", note="of all parameters"
        ),
        "load_s": Figure(value=load["seconds"], unit="s"),
        "first_step_s": Figure(value=found["step"]["first_s"], unit="s", note="with compilation"),
        "step_ms": Figure(value=1e3 * found["step"]["step_s"], unit="ms", note="plain JAX, median"),
    }
    if "calibrate" in found:
        figures |= calibrate_figures(found["calibrate"])
    for stage in ("quantize", "calibrate", "load", "step"):
        if stage in found:
            figures[f"{stage}_host_gb"] = Figure(
                value=found[stage]["host_bytes"] / 1e9, unit="GB", note="peak resident set"
            )
            if peak := found[stage].get("peak_bytes"):
                figures[f"{stage}_device_gib"] = Figure(value=peak / GIB, unit="GiB", note="peak")
    if load["device_bytes"]:
        figures["weights_device_gib"] = Figure(
            value=load["device_bytes"] / GIB, unit="GiB", note="packed, loaded"
        )
    return figures


def calibrate_figures(calibrate: dict[str, Any]) -> dict[str, Figure]:
    """Those of the stage `calibrate`, but for its peaks."""
    moments = calibrate["moments"]
    settings = (
        f"{calibrate['samples']} states, {calibrate['steps']} steps of {calibrate['batch_size']}, "
        "AdamW, float32 latent weights, compilation included"
    )
    figures = {
        "calibrated_gb": Figure(
            value=calibrate["stored_bytes"] / 1e9, unit="GB", note="transformer"
        ),
        "calibrate_s": Figure(
            value=calibrate["process_s"], unit="s", note="the whole process, two blocks trained"
        ),
        "calibrate_read_s": Figure(
            value=moments["weights read, first part passed"], unit="s", note="24 GB to the host"
        ),
        "calibrate_write_s": Figure(
            value=moments["written"] - moments["calibrated"],
            unit="s",
            note="the other blocks rounded, all packed and on the disk",
        ),
    }
    for name, report in calibrate["reports"].items():
        kind = name.partition("_")[0]
        figures[f"calibrate_{kind}_s"] = Figure(value=report["seconds"], unit="s", note=settings)
        for when in ("before", "after"):
            figures[f"{kind}_loss_{when}"] = Figure(
                value=report[when], unit="share", note="relative squared error, random weights"
            )
    if calibrate["limit_bytes"]:
        figures["calibrate_limit_gib"] = Figure(
            value=calibrate["limit_bytes"] / GIB, unit="GiB", note="all the device memory there was"
        )
    return figures


def main(
    size: Annotated[str, typer.Option(help="full, cpu or tiny.")] = "full",
    work: Annotated[
        Path | None, typer.Option(help="Folder for the checkpoints: 35 GB free in full size.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result file; a tiny run writes none else.")
    ] = None,
) -> None:
    """Measures every stage and writes the result file."""
    if size not in SIZES:
        raise SystemExit(f"error: --size must be one of {', '.join(SIZES)}, got {size}")
    start = time.perf_counter()
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ternary-fullsize-", dir=work) as name:
        found = measure(size, Path(name))
    load = found["load"]
    result = Result(
        benchmark="ternary_fullsize" if size == "full" else f"ternary_fullsize_{size}",
        device=str(describe_hardware()["cpu"]) if load["platform"] == "cpu" else load["device"],
        figures=result_figures(found),
    )
    for name, figure in result.figures.items():
        print(f"  {name:22} {figure.value:12.4g} {figure.unit:6} {figure.note}")
    if size != "tiny" or out is not None:
        print(f"written: {result.write(out or RESULTS).name}")
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    typer.run(main)
