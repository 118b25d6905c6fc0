"""FLUX.1-dev's shapes through the ternary tools: quantise, calibrate two blocks, load, one step.

    python -m benchmarks.ternary_fullsize --work /a/disk/with/35/GB    # one GPU, 64 GB of memory
    python -m benchmarks.ternary_fullsize --work /a/disk/with/30/GB --cpu    # 8 GB of memory
    python -m benchmarks.ternary_fullsize --tiny                       # anywhere, in a minute

Random bf16 weights of a trained model's scale (23.8 GB), made here. Each stage is a process of its
own, so that its peaks are its own; host memory is the peak resident set (`wait4`).

- quantize: `python -m ternary quantize`, a scale per output, all of it on the CPU.
- calibrate: one double and one single block at 1024 x 1024 (4096 image and 512 text tokens), the
  others rounded, and the whole ternary checkpoint written. On a GPU the device's memory is capped
  to what a card of 24 GB leaves to a program: `XLA_PYTHON_CLIENT_MEM_FRACTION` is `CARD_BYTES` over
  the memory that `nvidia-smi` tells, and `XLA_PYTHON_CLIENT_PREALLOCATE=true` makes that pool all
  there is: a byte more is an error, not a figure.
- load: the ternary checkpoint onto the device, uncapped.
- With `--cpu` nothing is calibrated: what is loaded is what was rounded, and a step is one of
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

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, Commit, Figure, OutOrNone, Result, Tiny, run
from benchmarks.machine import GIB, git_commit
from benchmarks.processes import card_environment, folder_bytes, run_module, run_process
from benchmarks.ternary_fullsize_worker import SIZES
from pallas_kernels.errors import UserError


def run_stage(
    stage: str, size: str, work: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """A stage's figures, as `run_module` gives them."""
    print(f"{stage} ...", flush=True)
    worker, options = "benchmarks.ternary_fullsize_worker", ["--work", str(work), "--size", size]
    figures = run_module(worker, stage, *options, environment=environment)
    seconds, host = figures["process_s"], figures["host_bytes"]
    print(f"{stage}: {seconds:.1f} s, {host / 1e9:.1f} GB on the host", flush=True)
    return figures


def measure(size: str, work: Path) -> Iterator[dict[str, Any]]:
    """The stages' figures by stage: all but the step's, then all."""
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
    found["load"] = run_stage("load", size, work)
    yield found
    found["step"] = run_stage("step", size, work)
    yield found


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
    }
    if step := found.get("step"):
        figures |= {
            "first_step_s": Figure(value=step["first_s"], unit="s", note="with compilation"),
            "step_ms": Figure(value=1e3 * step["step_s"], unit="ms", note="plain JAX, median"),
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
    tiny: Tiny = False,
    cpu: Annotated[
        bool, typer.Option(help="On the CPU: nothing is calibrated, a step of 256 x 256.")
    ] = False,
    work: Annotated[
        Path | None, typer.Option(help="Folder for the checkpoints: 35 GB free in full size.")
    ] = None,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Measures every stage and writes the result file."""
    if tiny and cpu:
        raise UserError("--tiny runs anywhere; leave out --cpu, which is of the full size")
    size = "cpu" if cpu else "tiny" if tiny else "full"
    start = time.perf_counter()
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ternary-fullsize-", dir=work) as name:
        for found in measure(size, Path(name)):
            result = Result(
                benchmark="ternary_fullsize" if size == "full" else f"ternary_fullsize_{size}",
                device=found["load"]["device"],
                figures=result_figures(found),
                commit=commit or git_commit(),
            )
            if out is not None or not tiny:
                # A run that is stopped in its last stage has the others.
                print(f"written: {result.write(out or RESULTS).name}", flush=True)
    for name, figure in result.figures.items():
        print(f"  {name:22} {figure.value:12.4g} {figure.unit:6} {figure.note}")
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    run(main)
