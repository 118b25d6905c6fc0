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

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import paper
from benchmarks.common import RESULTS, Commit, Figure, OutOrNone, Peer, Result, Tiny, run
from benchmarks.machine import GIB, git_commit
from benchmarks.processes import compilation_cache, run_module
from benchmarks.step_worker import VARIANTS
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError


def run_variant(
    variant: str, size: str, repeats: int, *, cold: bool, extra: list[str], common: list[str]
) -> dict[str, Any]:
    """Compiles one variant from an empty cache, then again from the filled one, and times it.

    Args:
      variant, size, repeats: of the step.
      cold: whether the first is wanted.
      extra: options of the timed run alone.
      common: options of both.

    Raises:
      RuntimeError: a process failed.
    """
    worker = ["benchmarks.step_worker", "--size", size, "--variant", variant, *common]
    with tempfile.TemporaryDirectory() as folder:
        cache = compilation_cache(folder)
        first = run_module(*worker, "--repeats", "0", environment=cache) if cold else None
        timed = run_module(*worker, "--repeats", str(repeats), *extra, environment=cache)
    if first is None:
        return {**timed, "compile_cold_s": timed["compile_s"]}
    return {
        **timed,
        "compile_cold_s": first["compile_s"],
        "compile_warm_s": timed["compile_s"],
    }


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


def part(what: str, run_it: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What a part of the benchmark found; None, after the reason, if it failed."""
    print(what, flush=True)
    try:
        return run_it()
    except RuntimeError as error:
        print(f"  {error}", file=sys.stderr)
        return None


def main(
    tiny: Tiny = False,
    variants: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(VARIANTS)}, separated by commas; the first is the figure."
        ),
    ] = "whole",
    kernels: Annotated[
        str | None,
        typer.Option(help="Of packed weights: mosaic, triton or jax; by itself if none."),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="An implementation of flux_jax.attention; its default if none."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 20,
    cold: Annotated[bool, typer.Option(help="Measure the compile with an empty cache.")] = True,
    floor: Annotated[bool, typer.Option(help="Time the products and the attention alone.")] = True,
    peers: Annotated[bool, typer.Option(help="Time diffusers too, eager and compiled.")] = False,
    peer_compile: Annotated[bool, typer.Option(help="Whether diffusers compiles too.")] = True,
    profile: Annotated[
        Path | None, typer.Option(help="Trace the first variant here, others in folders below.")
    ] = None,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Times one step of the FLUX.1-dev transformer and writes the result file."""
    size = "tiny" if tiny else "full"
    wanted = variants.split(",")
    if unknown := sorted(set(wanted) - set(VARIANTS)):
        expected = ", ".join(VARIANTS)
        raise UserError(f"--variants: expected some of {expected}, got {', '.join(unknown)}")
    common = ["--kernels", kernels] if kernels else []
    common += ["--attention", attention] if attention else []
    found: list[dict[str, Any] | None] = []
    for index, variant in enumerate(wanted):
        extra = ["--floor"] if floor and index == 0 else []
        if profile is not None:
            place = profile.resolve() / ("" if index == 0 else variant)
            extra += ["--profile", str(place)]
        one = partial(run_variant, variant, size, repeats, cold=cold, extra=extra, common=common)
        found.append(part(f"variant {variant}", one))
    peer = None
    if peers and any(found):
        arguments = ["--size", size, "--repeats", str(repeats)]
        arguments += [] if peer_compile else ["--no-compiled"]
        module = "benchmarks.peers.diffusers_step"
        peer = part("peer diffusers", partial(run_module, module, *arguments))

    figures: dict[str, Figure] = {}
    device = ""
    for index, (variant, measured) in enumerate(zip(wanted, found, strict=True)):
        if measured is not None:
            device = device or measured["device"]
            figures |= variant_figures(measured, "" if index == 0 else f"/{variant}")
            figures |= floor_figures(measured["floors_ms"]) if "floors_ms" in measured else {}
    if not figures:
        raise SystemExit("error: no variant ran, nothing to write")
    result = Result(
        benchmark="transformer_step_tiny" if tiny else "transformer_step",
        device=device,
        figures=figures | paper_figures(*paper.SIZES[size]),
        peers=peer_results(peer) if peer else {},
        commit=commit or git_commit(),
    )
    for name, figure in result.figures.items():
        print(f"  {name:26} {figure.value:10.3f} {figure.unit}")
    for name, other in result.peers.items():
        print(f"  {name}: {other.figures['step_ms'].value:.2f} ms")
    if out is not None or not tiny:
        print(f"written: {result.write(out or RESULTS).name}")
    if None in found or (peers and peer is None):
        raise SystemExit("error: a part of the benchmark failed, see above")


if __name__ == "__main__":
    run(main)
