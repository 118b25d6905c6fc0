"""Times one step of the FLUX.1-dev transformer: 1024 x 1024 pixels, batch 1, bf16, random weights.

    python -m benchmarks.transformer_step --peers        # on a GPU with 32 GB or more
    python -m benchmarks.transformer_step --tiny --peers # the shipped model's size, anywhere

Measured, each in a process of its own: the compile with an empty cache and with a filled one, the
step (median, queued and one at a time, several input sets in turn), the peak memory, the products
and the attention of the step alone, and diffusers on the same machine. Beside them what `paper`
computes.
Writes `benchmarks/results/transformer_step_<device>.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import paper
from benchmarks.common import (
    REPOSITORY,
    RESULTS,
    Figure,
    Peer,
    Result,
    command_line,
    describe_hardware,
    git_commit,
    package_versions,
)
from flux_jax.configs import FluxConfig

GIB = 2**30


def run_module(module: str, *arguments: str, environment: dict[str, str]) -> dict[str, Any] | None:
    """Runs a module that writes its figures to `--output`; None if it failed, after its message."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", module, "--output", str(output), *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment})
        if done.returncode or not output.exists():
            print(f"  {module} failed (exit code {done.returncode})", file=sys.stderr)
            return None
        return json.loads(output.read_text(encoding="utf-8"))


def run_variant(
    variant: str, size: str, repeats: int, *, cold: bool, extra: list[str], common: list[str]
) -> dict[str, Any] | None:
    """Compiles one variant from an empty cache, then again from the filled one, and times it.

    Args:
      variant, size, repeats: of the step.
      cold: whether the first is wanted.
      extra: options of the timed run alone.
      common: options of both.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        common = ["--size", size, "--variant", variant, *common]
        first = None
        if cold:
            first = run_module(
                "benchmarks.step_worker", *common, "--repeats", "0", environment=environment
            )
        timed = run_module(
            "benchmarks.step_worker",
            *common,
            *("--repeats", str(repeats)),
            *extra,
            environment=environment,
        )
    if timed is None or (cold and first is None):
        return None
    if first is not None:
        timed["compile_cold_s"], timed["compile_warm_s"] = first["compile_s"], timed["compile_s"]
    else:
        timed["compile_cold_s"] = timed["compile_s"]
    return timed


def variant_figures(measured: dict[str, Any], suffix: str = "") -> dict[str, Figure]:
    """The figures of one variant; all but the first variant's have a suffix to their names."""
    figures = {
        "step_ms": Figure(value=measured["step_ms"], unit="ms", note="median, four queued"),
        "waited_ms": Figure(value=measured["waited_ms"], unit="ms", note="median, one at a time"),
        "compile_cold_s": Figure(
            value=measured["compile_cold_s"], unit="s", note="tracing included, empty cache"
        ),
    }
    if "compile_warm_s" in measured:
        figures["compile_warm_s"] = Figure(
            value=measured["compile_warm_s"], unit="s", note="tracing included, filled cache"
        )
    if measured.get("peak_bytes"):
        figures["peak_gib"] = Figure(value=measured["peak_bytes"] / GIB, unit="GiB")
    return {name + suffix: figure for name, figure in figures.items()}


def paper_figures(config: FluxConfig, step: paper.Step) -> dict[str, Figure]:
    """What the step must hold and compute, from `benchmarks.paper`."""
    linears = sum(p.flops for p in paper.products(config, step) if p.m > step.batch)
    return {
        "paper_weights_gib": Figure(
            value=2 * paper.parameter_count(config) / GIB, unit="GiB", note="computed"
        ),
        "paper_activations_gib": Figure(
            value=sum(paper.activation_bytes(config, step).values()) / GIB,
            unit="GiB",
            note="computed",
        ),
        "paper_total_gib": Figure(
            value=paper.step_bytes(config, step) / GIB, unit="GiB", note="computed"
        ),
        "paper_linears_tflop": Figure(value=linears / 1e12, unit="TFLOP", note="computed"),
        "paper_attention_tflop": Figure(
            value=paper.attention_flops(config, step) / 1e12, unit="TFLOP", note="computed"
        ),
    }


def floor_figures(floors: dict[str, float]) -> dict[str, Figure]:
    """The time of the step's parts alone, summed by group."""
    modulation = sum(value for name, value in floors.items() if name.endswith("modulation"))
    parts = {
        "floor_ms": (floors["total"], "products, attention and modulation, each timed alone"),
        "floor_attention_ms": (floors["attention"], "all blocks"),
        "floor_modulation_ms": (modulation, "one-row products of all blocks"),
        "floor_linears_ms": (
            floors["total"] - floors["attention"] - modulation,
            "bf16 products of all blocks, without bias and activation",
        ),
    }
    return {
        name: Figure(value=value, unit="ms", note=note) for name, (value, note) in parts.items()
    }


def peer_results(measured: dict[str, Any]) -> dict[str, Peer]:
    """diffusers' figures by mode."""
    peers = {}
    for mode, values in measured["modes"].items():
        figures = {
            "step_ms": Figure(value=values["step_ms"], unit="ms", note="median, four queued"),
            "waited_ms": Figure(value=values["waited_ms"], unit="ms", note="median, one at a time"),
            "first_step_s": Figure(
                value=values["first_step_s"], unit="s", note="compilation included"
            ),
        }
        if "peak_bytes" in values:
            figures["peak_gib"] = Figure(value=values["peak_bytes"] / GIB, unit="GiB")
        peers[f"diffusers, {mode}"] = Peer(versions=measured["versions"], figures=figures)
    return peers


def main(
    tiny: Annotated[bool, typer.Option(help="The shipped model's size.")] = False,
    variants: Annotated[
        str,
        typer.Option(
            help="whole, hoisted, blocks, ternary-a8, ternary-a16: comma-separated, the first is "
            "the figure."
        ),
    ] = "whole",
    kernels: Annotated[
        str | None,
        typer.Option(help="Of packed weights: mosaic, triton or jax; by itself if none."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 20,
    cold: Annotated[bool, typer.Option(help="Measure the compile with an empty cache.")] = True,
    floor: Annotated[bool, typer.Option(help="Time the products and the attention alone.")] = True,
    peers: Annotated[bool, typer.Option(help="Time diffusers too, eager and compiled.")] = False,
    peer_compile: Annotated[bool, typer.Option(help="Whether diffusers compiles too.")] = True,
    profile: Annotated[
        Path | None, typer.Option(help="Trace the first variant here, others in folders below.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result file.")] = None,
    commit: Annotated[str | None, typer.Option(help="Where .git is absent: the commit.")] = None,
) -> None:
    """Times one step of the FLUX.1-dev transformer and writes the result file."""
    size = "tiny" if tiny else "full"
    config = FluxConfig.tiny() if tiny else FluxConfig.dev()
    step = paper.Step(image_tokens=64, text_tokens=48) if tiny else paper.Step()
    figures: dict[str, Figure] = {}
    device, failed = "", False
    for index, variant in enumerate(variants.split(",")):
        extra = []
        if index == 0:
            extra = ["--floor"] * floor + (["--profile", str(profile.resolve())] if profile else [])
        elif profile is not None:
            extra = ["--profile", str(profile.resolve() / variant)]
        print(f"variant {variant}", flush=True)
        chosen = ["--kernels", kernels] if kernels else []
        measured = run_variant(variant, size, repeats, cold=cold, extra=extra, common=chosen)
        if measured is None:
            failed = True
            continue
        device = device or (
            measured["device"] if measured["platform"] != "cpu" else describe_hardware()["cpu"]
        )
        figures |= variant_figures(measured, "" if index == 0 else f"/{variant}")
        if "floors_ms" in measured:
            figures |= floor_figures(measured["floors_ms"])
    if not figures:
        raise SystemExit("error: no variant ran, nothing to write")
    results = {}
    if peers:
        print("peer diffusers", flush=True)
        arguments = ["--size", size, "--repeats", str(repeats)]
        arguments += [] if peer_compile else ["--no-compiled"]
        measured = run_module("benchmarks.peers.diffusers_step", *arguments, environment={})
        failed |= measured is None
        results = peer_results(measured) if measured else {}

    result = Result(
        benchmark="transformer_step_tiny" if tiny else "transformer_step",
        device=device,
        figures=figures | paper_figures(config, step),
        peers=results,
        command=command_line(),
        versions=package_versions(),
        commit=commit or git_commit(),
    )
    for name, figure in result.figures.items():
        print(f"  {name:26} {figure.value:10.3f} {figure.unit}")
    for name, peer in result.peers.items():
        print(f"  {name}: {peer.figures['step_ms'].value:.2f} ms")
    if out is not None or not tiny:
        print(f"written: {result.write(out or RESULTS).name}")
    if failed:
        raise SystemExit("error: a part of the benchmark failed, see above")


if __name__ == "__main__":
    typer.run(main)
