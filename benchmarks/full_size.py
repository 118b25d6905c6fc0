"""FLUX.1-dev's shapes on one GPU, text to PNG: the paper's efficiency table, with its peers.

    python -m benchmarks.full_size --work /a/disk/with/16/GB     # one GPU with 48 GB
    python -m benchmarks.full_size --size tiny                   # anywhere, in some minutes
    python -m benchmarks.full_size --only 'loop|peer' ...        # some of the parts
    python -m benchmarks.full_size --combine a.json b.json       # results of several runs to one

Each part runs in processes of its own, so that its peaks are its own, with one compilation cache
for all in the work folder. A part that fails is told and left out. Writes
`benchmarks/results/full_size_<device>.json`; `python -m benchmarks.full_size_plot` draws from it
how time and memory grow, and `python -m benchmarks.render_tables` puts both into the README. What
each part measures and takes: docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import (
    RESULTS,
    Figure,
    Peer,
    Result,
    command_line,
    describe_hardware,
    git_commit,
    read_result,
)
from benchmarks.full_size_worker import KINDS, SIZES
from benchmarks.ternary_fullsize import card_environment, run_process
from benchmarks.transformer_step import peer_results

GIB = 2**30
TERNARY = "ternary A8"


@dataclasses.dataclass
class Bench:
    """What the parts share, and what they found.

    Attributes:
      size: "full" or "tiny".
      work: folder of the checkpoint and of the compilation cache.
      figures, peers: as in `Result`.
      device: what was measured on, once a part has told.
    """

    size: str
    work: Path
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    peers: dict[str, Peer] = dataclasses.field(default_factory=dict)
    device: str = ""

    def run(
        self, module: str, *arguments: str, environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON that a module writes to `--output`.

        Raises:
          RuntimeError: it failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "figures.json"
            command = [sys.executable, "-m", module, *arguments, "--size", self.size]
            run_process(
                [*command, "--output", str(output)], {**self.cache(), **(environment or {})}
            )
            found = json.loads(output.read_text(encoding="utf-8"))
        if "device" in found:
            cpu = found["platform"] == "cpu"
            self.device = str(describe_hardware()["cpu"]) if cpu else found["device"]
        return found

    def worker(self, stage: str, kind: str, *arguments: str, **options: Any) -> dict[str, Any]:
        """A stage of `benchmarks.full_size_worker`."""
        places = ["--work", str(self.work), "--kind", kind]
        return self.run("benchmarks.full_size_worker", stage, *places, *arguments, **options)

    def cache(self) -> dict[str, str]:
        """Settings for one compilation cache."""
        return {
            "JAX_COMPILATION_CACHE_DIR": str(self.work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.figures[name] = Figure(value=value, unit=unit, note=note)

    def model(self) -> Path:
        """The ternary pipeline on disk, made if it is not there."""
        if not (self.work / "made.json").exists():
            shutil.rmtree(self.work / "model", ignore_errors=True)
            found = self.worker("source", TERNARY, environment={"JAX_PLATFORMS": "cpu"})
            (self.work / "made.json").write_text(json.dumps(found))
        return self.work / "model"

    def generate(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """One image by the command line: what it tells with `--json`, and its seconds in all.

        Raises:
          RuntimeError: it failed.
        """
        sizes = SIZES[self.size]
        with tempfile.TemporaryDirectory() as folder:
            told, image = Path(folder) / "told.json", Path(folder) / "image.png"
            call = {
                "--model": self.model(),
                "--steps": sizes.steps,
                "--height": sizes.side,
                "--width": sizes.side,
                "--max-sequence-length": sizes.text_tokens,
                "--seed": 0,
                "--out": image,
            }
            options = [str(part) for pair in call.items() for part in pair]
            command = [sys.executable, "-m", "flux_jax", "generate", "a lighthouse", *options]
            with told.open("w") as stdout:
                seconds, host = run_process(
                    [*command, "--json", "--quiet"],
                    {**self.cache(), **(environment or {})},
                    stdout=stdout,
                )
            if not image.exists():
                raise RuntimeError("generate left no image")
            return {**json.loads(told.read_text()), "process_s": seconds, "host_bytes": host}


def checkpoint(bench: Bench) -> None:
    """The ternary pipeline on disk."""
    bench.model()
    made = json.loads((bench.work / "made.json").read_text())
    bench.add("disk_bf16_gb", made["bf16_bytes"] / 1e9, "GB", "transformer, two bytes a parameter")
    bench.add("disk_ternary_gb", made["ternary_bytes"] / 1e9, "GB", "transformer, its files")
    bench.add("ternary_share", made["ternary_share"], "share", "of the parameters")


def loop(kind: str, stage: str = "loop") -> Callable[[Bench], None]:
    """Steps of the pipeline's loop; a first process compiles, as its peak counts the tuning."""

    def run(bench: Bench) -> None:
        first = bench.worker(stage, kind, "--loops", "1")
        if first["out_of_memory"]:
            raise RuntimeError(f"{kind}: out of memory")
        found = bench.worker(stage, kind)
        name = kind if stage == "loop" else f"{kind}, modulation weights on the host"
        note = f"median of {found['groups']} groups of queued steps"
        bench.add(f"{name}/step_ms", 1e3 * found["step_s"], "ms", note)
        bench.add(f"{name}/planned_gib", found["planned_bytes"] / GIB, "GiB", "planned by XLA")
        if found["peak_bytes"]:
            bench.add(f"{name}/peak_gib", found["peak_bytes"] / GIB, "GiB", "of the allocator")

    return run


def floor(bench: Bench) -> None:
    """The least that a step with 8-bit products can take."""
    found = bench.worker("floor", TERNARY)["floors_ms"]
    bench.add("floor_ms", found["total"], "ms", "int8 products and attention, each timed alone")
    bench.add("floor_attention_ms", found["attention"], "ms", "all blocks")


def peer_steps(bench: Bench) -> None:
    """diffusers' step: eager, compiled, and in float8."""
    module, options = "benchmarks.peers.diffusers_step", ["--fp8"]
    if bench.size == "tiny":
        # PyTorch's compiler takes minutes on a CPU.
        options += ["--no-compiled", "--repeats", "2"]
    bench.peers |= peer_results(bench.run(module, *options))


def peer_pipeline(bench: Bench) -> None:
    """diffusers' whole pipeline, all of it on the device."""
    found = bench.run("benchmarks.peers.diffusers_pipeline")
    figures = {"draw_s": Figure(value=found["figures"]["draw_s"], unit="s", note="an image")}
    peak = found["figures"].get("peak_bytes")
    if peak:
        figures["peak_gib"] = Figure(value=peak / GIB, unit="GiB")
    bench.peers["diffusers, whole pipeline"] = Peer(versions=found["versions"], figures=figures)


def pipeline(bench: Bench) -> None:
    """Text to PNG by the command line, twice: the second finds its programs and files cached."""
    cold, warm = bench.generate(), bench.generate()
    bench.add("first_image_cold_s", cold["process_s"], "s", "process start to end, empty cache")
    bench.add("first_image_s", warm["process_s"], "s", "process start to end, caches warm")
    for stage, seconds in warm["seconds"].items():
        bench.add(f"first_image_{stage.replace(' ', '_')}_s", seconds, "s", "of it")
    bench.add("pipeline_host_gb", warm["host_bytes"] / 1e9, "GB", "peak resident set")
    if warm["peak_device_bytes"]:
        bench.add("pipeline_peak_gib", warm["peak_device_bytes"] / GIB, "GiB", "text to PNG")


def card(bench: Bench) -> None:
    """With the memory of a 24 GB card: the bf16 loop alone, and the whole ternary pipeline."""
    environment = card_environment()
    if not environment:
        print("  no GPU whose memory could be capped: nothing to show")
        return
    dense = bench.worker("loop", "bf16", "--loops", "1", environment=environment)
    bench.add("card_bf16_runs_out", float(dense["out_of_memory"]), "yes", "the loop alone")
    bench.add("card_limit_gib", dense["limit_bytes"] / GIB, "GiB", "all the memory there was")
    try:
        bench.generate(environment)
    except RuntimeError as error:
        print(f"  {error}")
        bench.add("card_ternary_draws", 0.0, "yes", "text to PNG")
    else:
        bench.add("card_ternary_draws", 1.0, "yes", "text to PNG")


def scaling(kind: str) -> Callable[[Bench], None]:
    """Time and memory by the picture's size and by the batch."""

    def run(bench: Bench) -> None:
        for one in bench.worker("scaling", kind)["shapes"].values():
            name = f"{kind}, {one['side']} pixels, batch {one['batch']}"
            bench.add(f"{name}/step_ms", 1e3 * one["step_s"], "ms", "median of queued steps")
            planned = one["planned_bytes"] / GIB
            bench.add(f"{name}/planned_gib", planned, "GiB", "planned by XLA")

    return run


PARTS: dict[str, Callable[[Bench], None]] = {
    "checkpoint": checkpoint,
    **{f"loop {kind}": loop(kind) for kind in KINDS},
    "loop offloaded": loop(TERNARY, "offloaded"),
    "floor": floor,
    "peer steps": peer_steps,
    "peer pipeline": peer_pipeline,
    "pipeline": pipeline,
    "card": card,
    "scaling ternary": scaling(TERNARY),
    "scaling bf16": scaling("bf16"),
}


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


def combine(paths: list[Path]) -> Result:
    """One result of several runs of this benchmark that differ in their parts.

    Raises:
      SystemExit: runs of other benchmarks, devices or commits.
    """
    results = [read_result(path) for path in paths]
    first = results[0]
    figures: dict[str, Figure] = {}
    peers: dict[str, Peer] = {}
    for path, result in zip(paths, results, strict=True):
        for field in ("benchmark", "device", "commit"):
            mine, other = getattr(first, field), getattr(result, field)
            if mine != other:
                raise SystemExit(f"error: {path}: {field} is {other}, not {mine} as before")
        figures |= result.figures
        peers |= result.peers
    return dataclasses.replace(first, figures={**figures, **derived(figures, peers)}, peers=peers)


def main(
    size: Annotated[str, typer.Option(help="full, or tiny.")] = "full",
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
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result file; a tiny run writes none else.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Where .git is absent: the commit.")] = None,
) -> None:
    """Measures the parts and writes the result file."""
    if combined:
        print(f"written: {combine(combined).write(out or RESULTS).name}")
        return
    if size not in SIZES:
        raise SystemExit(f"error: --size must be one of {', '.join(SIZES)}, got {size}")
    wanted = [name for name in PARTS if only is None or re.search(only, name)]
    if not wanted:
        raise SystemExit(f"error: --only {only} finds none of {', '.join(PARTS)}")
    start, failed = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="full-size-") as temporary:
        bench = Bench(size=size, work=(work or Path(temporary)).absolute())
        bench.work.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            begun = time.perf_counter()
            if minutes is not None and begun - start > 60 * minutes:
                print(f"{name}: no time left")
                failed.append(name)
                continue
            print(f"{name} ...", flush=True)
            try:
                PARTS[name](bench)
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed.append(name)
            print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if not bench.figures and not bench.peers:
        raise SystemExit("error: no part ran, nothing to write")
    figures = {**bench.figures, **derived(bench.figures, bench.peers)}
    result = Result(
        benchmark="full_size" if size == "full" else "full_size_tiny",
        device=bench.device or _device(),
        figures=figures,
        peers=bench.peers,
        command=command_line(),
        commit=commit or git_commit(),
    )
    for name, figure in result.figures.items():
        print(f"  {name:44} {figure.value:12.4g} {figure.unit:6} {figure.note}")
    if out is not None or size == "full":
        print(f"written: {result.write(out or RESULTS).name}")
    if failed:
        raise SystemExit(f"error: not measured: {', '.join(failed)}")


def _device() -> str:
    """Where no part of ours ran: the GPU's name, or the processor's."""
    hardware = describe_hardware()
    return str(hardware.get("gpu") or hardware["cpu"])


if __name__ == "__main__":
    typer.run(main)
