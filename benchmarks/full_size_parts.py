"""The parts of `benchmarks.full_size`: what each runs in processes of its own, and its figures."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, Peer
from benchmarks.full_size_worker import KINDS, SIZES
from benchmarks.machine import GIB
from benchmarks.processes import card_environment, compilation_cache, run_module, run_process
from benchmarks.transformer_step import peer_results
from pallas_kernels.files import write_whole

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
        """As `run_module`, at this size and with the compilation cache.

        Raises:
          RuntimeError: it failed.
        """
        settings = {**self.cache(), **(environment or {})}
        found = run_module(module, *arguments, "--size", self.size, environment=settings)
        self.device = found.get("device", self.device)
        return found

    def worker(self, stage: str, kind: str, *arguments: str, **options: Any) -> dict[str, Any]:
        """A stage of `benchmarks.full_size_worker`."""
        places = ["--work", str(self.work), "--kind", kind]
        return self.run("benchmarks.full_size_worker", stage, *places, *arguments, **options)

    def cache(self) -> dict[str, str]:
        """Settings for one compilation cache."""
        return compilation_cache(self.work / "compiled")

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        """A figure of ours."""
        self.figures[name] = Figure(value=value, unit=unit, note=note)

    def model(self) -> Path:
        """The ternary pipeline on disk, made if it is not there, or of the other size."""
        if self.made().get("size") != self.size:
            shutil.rmtree(self.work / "model", ignore_errors=True)
            found = self.worker("source", TERNARY, environment={"JAX_PLATFORMS": "cpu"})
            write_whole(self.work / "made.json", json.dumps({**found, "size": self.size}))
        return self.work / "model"

    def made(self) -> dict[str, Any]:
        """What the pipeline on disk is; nothing if none was made."""
        try:
            return json.loads((self.work / "made.json").read_text())
        except FileNotFoundError:
            return {}

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
    made = bench.made()
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
    "peer steps": peer_steps,
    "floor": floor,
    "pipeline": pipeline,
    "card": card,
    "loop offloaded": loop(TERNARY, "offloaded"),
    "peer pipeline": peer_pipeline,
    "scaling ternary": scaling(TERNARY),
    "scaling bf16": scaling("bf16"),
}
