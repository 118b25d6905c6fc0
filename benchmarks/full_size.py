"""FLUX.1-dev's shapes on one GPU, text to PNG: the paper's efficiency table, with its peers.

    python -m benchmarks.full_size --work /a/disk/with/16/GB     # one GPU with 48 GB
    python -m benchmarks.full_size --tiny                        # anywhere, in some minutes
    python -m benchmarks.full_size --only 'loop|peer' ...        # some of the parts
    python -m benchmarks.full_size --combine a.json --combine b.json     # results to one

Each part runs in processes of its own, so that its peaks are its own, with one compilation cache
for all in the work folder. A part that fails is told and left out. Writes
`benchmarks/results/full_size_<device>.json`; `python -m benchmarks.full_size_plot` draws from it
how time and memory grow, and `python -m benchmarks.render_tables` puts both into the README. What
each part measures and takes: docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import (
    RESULTS,
    Commit,
    Figure,
    OutOrNone,
    Peer,
    Result,
    Tiny,
    found_by,
    run,
)
from benchmarks.full_size_parts import PARTS, TERNARY, Bench
from benchmarks.joining import joined
from benchmarks.machine import describe_hardware, git_commit


def derived(figures: dict[str, Figure], peers: dict[str, Peer]) -> dict[str, Figure]:
    """The ratios of the table, as far as both sides are there."""
    values = {name: figure.value for name, figure in figures.items()}
    for peer, content in peers.items():
        values |= {f"{peer}/{name}": figure.value for name, figure in content.figures.items()}
    step = f"{TERNARY}/step_ms"
    pairs = {
        "ratio_disk": ("disk_bf16_gb", "disk_ternary_gb", "bf16 over ternary"),
        "ratio_peak": ("bf16/peak_gib", f"{TERNARY}/peak_gib", "bf16 over ternary, both resident"),
        "over_eager": ("diffusers, eager/step_ms", step, "theirs over ours"),
        "over_compiled": ("diffusers, compiled blocks/step_ms", step, "theirs over ours"),
        "over_fp8": ("diffusers, fp8, compiled blocks/step_ms", step, "theirs over ours"),
        "over_floor": (step, "floor_ms", "ours over the floor"),
        "a16_over_compiled": (
            "diffusers, compiled blocks/step_ms",
            "ternary A16/step_ms",
            "theirs over ours",
        ),
    }
    return {
        name: Figure(value=values[over] / values[under], unit="x", note=note)
        for name, (over, under, note) in pairs.items()
        if over in values and under in values
    }


def combine(paths: list[Path], *, mixed: bool = False) -> Result:
    """One result of several runs of this benchmark that differ in their parts; see `joined`."""
    result = joined(paths, mixed=mixed)
    figures = dict(result.figures)
    return dataclasses.replace(result, figures=figures | derived(figures, dict(result.peers)))


def measure(
    bench: Bench, names: list[str], parts: dict[str, Callable[[Bench], None]], minutes: float | None
) -> list[str]:
    """Runs parts one after the other.

    Args:
      bench: takes what they find.
      names: of the parts, in order.
      parts: all that there are.
      minutes: begin none after this time.

    Returns:
      Those that failed, or for which there was no time.
    """
    start, missing = time.perf_counter(), []
    for name in names:
        begun = time.perf_counter()
        if minutes is not None and begun - start > 60 * minutes:
            print(f"{name}: no time left")
            missing.append(name)
            continue
        print(f"{name} ...", flush=True)
        try:
            parts[name](bench)
        except Exception as error:  # what the parts before it measured is written all the same
            told = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            print(f"{name}: {told}{error}", file=sys.stderr)
            missing.append(name)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return missing


def main(
    tiny: Tiny = False,
    only: Annotated[
        str | None, typer.Option(help=f"Parts whose name this pattern finds: {', '.join(PARTS)}.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no part after this time; write what there is.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the checkpoint and the compiled programs, kept: 16 GB in full size."
        ),
    ] = None,
    combined: Annotated[
        list[Path] | None,
        typer.Option("--combine", help="Measure nothing: join these result files of other parts."),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed-commits", help="Join results of several commits, noted at figures."),
    ] = False,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Measures the parts and writes the result file."""
    if combined:
        print(f"written: {combine(combined, mixed=mixed).write(out or RESULTS).name}")
        return
    wanted = found_by(only, list(PARTS))
    with tempfile.TemporaryDirectory(prefix="full-size-") as temporary:
        place = (work or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        bench = Bench(size="tiny" if tiny else "full", work=place)
        missing = measure(bench, wanted, PARTS, minutes)
    if not bench.figures and not bench.peers:
        raise SystemExit("error: no part ran, nothing to write")
    figures = {**bench.figures, **derived(bench.figures, bench.peers)}
    result = Result(
        benchmark="full_size_tiny" if tiny else "full_size",
        device=bench.device or _device(),
        figures=figures,
        peers=bench.peers,
        commit=commit or git_commit(),
    )
    for name, figure in result.figures.items():
        print(f"  {name:44} {figure.value:12.4g} {figure.unit:6} {figure.note}")
    if out is not None or not tiny:
        print(f"written: {result.write(out or RESULTS).name}")
    if missing:
        raise SystemExit(f"error: not measured: {', '.join(missing)}")


def _device() -> str:
    """Where no part of ours ran: the GPU's name, or the processor's."""
    hardware = describe_hardware()
    return str(hardware.get("gpu") or hardware["cpu"])


if __name__ == "__main__":
    run(main)
