"""What each choice of the distillation is worth, on the shipped model: one table, one run.

    python -m benchmarks.distillation --steps 4000    # a GPU; about a minute a row
    python -m benchmarks.distillation --smoke         # that it works
    # A CPU, some minutes a row:
    python -m benchmarks.distillation --steps 400 --batch 16 --held-out 120 --dtype float32

Every row makes a ternary student of the shipped model, trained for the same number of steps on the
same prompts, and draws the held-out evaluation prompts with it from the teacher's noise. The two
best rows are run again with other seeds. Writes `benchmarks/results/distillation_<device>.json`
(with `--smoke` only where `--out` says);
`python -m benchmarks.render_tables` puts it into docs/distillation.md.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

from benchmarks.common import (
    RESULTS,
    Commit,
    Figure,
    OutOrNone,
    Result,
    found_by,
    read_result,
    results_folder,
    run,
)
from benchmarks.distillation_rows import BASE, POLICY, ROWS, Row
from benchmarks.joining import joined
from benchmarks.machine import git_commit
from benchmarks.processes import folder_bytes
from examples.tiny_flux.scenes import T5_LENGTH, sample_captions
from flux_jax import images
from flux_jax.assets import resolve
from flux_jax.composition.prompts import load_prompts
from flux_jax.composition.score import score_images
from flux_jax.errors import UserError
from flux_jax.linears import linears
from flux_jax.pipeline import FluxPipeline
from flux_jax.tree import Flat, split_flat
from ternary.calibration.run import calibrate_checkpoint
from ternary.config import CalibrateConfig, DistillConfig
from ternary.distillation.held_out import HeldOut, grid
from ternary.distillation.step import PromptSet, StepFunction, TrainState
from ternary.distillation.trajectory import Trajectories
from ternary.layers import FakeTernaryLinear
from ternary.storage.latents import load_latents
from ternary.storage.saving import save_checkpoint
from ternary.student import freeze_student, make_student


class Bench:
    """The teacher, the prompts and what all rows share."""

    def __init__(
        self, config: DistillConfig, *, batch: int, prompts: int, held_out: int | None = None
    ):
        self.config = config
        self.batch = batch
        self.pipe = FluxPipeline.from_pretrained("tiny", dtype=config.compute_dtype)
        self.start = time.perf_counter()
        captions = sample_captions(17, 0, prompts)[0]
        self.embeds = self._encode(captions)
        self.prompts = PromptSet(self.embeds.prompt_embeds, self.embeds.pooled_prompt_embeds)
        judged = load_prompts()
        self.judged = judged[:: max(1, len(judged) // held_out)] if held_out else judged
        texts = [prompt.prompt for prompt in self.judged]
        self.held_out = HeldOut(self.pipe, self._encode(texts), batch_size=min(240, len(texts)))
        self.rebuild, self.teacher = split_flat(self.pipe.transformer)
        self.say(f"{len(captions)} prompts, {len(texts)} held out")

    def say(self, text: str) -> None:
        """One line, after the seconds since the start."""
        print(f"{time.perf_counter() - self.start:7.1f} s  {text}", flush=True)

    def _encode(self, texts: list[str]) -> Any:
        size = min(len(texts), 512)
        encode = self.pipe.text_encoders.encode
        return encode(texts, max_sequence_length=T5_LENGTH, batch_size=size)

    def step(self, row: Row) -> tuple[StepFunction, Flat]:
        """A row's step and its student's first parameters."""
        student = make_student(self.pipe.transformer, row.quant, POLICY)
        trajectories = Trajectories(
            row.trajectory,
            self.pipe.scheduler,
            tokens=(64, self.pipe.transformer.config.in_channels),
            batch_size=self.batch,
            prompts=len(self.embeds.prompts),
        )
        step = StepFunction(self.pipe.transformer, student, self.config, trajectories)
        return step, split_flat(student)[1]

    def compile(self, row: Row) -> tuple[Any, Any]:
        """The training step and the spreading of the first states."""
        step, params = self.step(row)
        state = jax.eval_shape(step.start, params)
        train = jax.jit(step, donate_argnums=0).lower(state, self.teacher, self.prompts)
        spread = jax.jit(step.spread).lower(state.pool, self.teacher, self.prompts)
        return train.compile(), spread.compile()

    def calibrate(self, folder: Path, steps: int) -> Flat:
        """Latent weights of a block-by-block calibration of the base student."""
        config = CalibrateConfig(
            samples=min(1024, 4 * self.batch), batch_size=min(64, self.batch), steps=steps
        )
        parts: list[Any] = [np.asarray(part) for part in self.prompts]
        host = PromptSet(*parts)
        calibrate_checkpoint(resolve("tiny"), folder, host, BASE, POLICY, config, grid=(8, 8))
        flat, _, _ = load_latents(folder)
        return {name: jnp.asarray(flat[name]) for name in flat}

    def train(self, row: Row, programs: tuple[Any, Any], start: Flat | None) -> tuple[Any, float]:
        """A row's student, and its mean relative error over the last steps."""
        step, params = self.step(row)
        state: TrainState = step.start(params if start is None else start, row.seed)
        if not row.trained:
            return step.student(state.params), float("nan")
        train, spread = programs
        state = state._replace(pool=spread(state.pool, self.teacher, self.prompts))
        errors = []
        for number in range(self.config.steps):
            state, metrics = train(state, self.teacher, self.prompts)
            if number % 50 == 0 or number >= self.config.steps - 100:
                # Looking now and then keeps the queue short.
                errors.append(float(metrics.relative))
        return step.student(state.params), float(np.mean(errors[-100:]))

    def draw(self, row: Row, student: Any) -> tuple[np.ndarray, dict[str, Figure]]:
        """A student's pictures, and its figures but for the score."""
        if row.drawn_bits is not None:
            student = nnx.merge(*nnx.split(student))
            for layer in linears(student, FakeTernaryLinear).values():
                layer.config = dataclasses.replace(layer.config, activation_bits=row.drawn_bits)
        found = self.held_out.compare(freeze_student(student))
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / "out", student, rest=resolve("tiny"))
            size = folder_bytes(Path(folder) / "out" / "transformer")
        total = sum(int(np.prod(v.shape)) for v in self.teacher.values())
        return found.images, {
            "median_psnr": Figure(value=found.median_psnr, unit="dB"),
            "low_psnr": Figure(value=float(np.percentile(found.psnr, 10)), unit="dB"),
            "bits": Figure(value=8 * size / total, unit="bit", note="of each parameter"),
            "megabytes": Figure(value=size / 1e6, unit="MB"),
        }


def _score(pictures: np.ndarray, prompts: list[Any]) -> float:
    return score_images(list(images.to_uint8(pictures)), prompts).overall.passed


class Runner:
    """Trains, draws and scores rows one after another; what it found is in `figures`."""

    def __init__(self, bench: Bench, programs: dict[Any, Any], *, calibration_steps: int):
        self.bench = bench
        self.figures: dict[str, Figure] = {}
        self._programs = programs
        self._calibration_steps = calibration_steps
        self._calibrated: Flat | None = None
        self._trained: dict[Row, Any] = {}
        self._scores: dict[str, Future[float]] = {}
        # The detector works on the host while the next row trains.
        self._judges = ProcessPoolExecutor(8, mp_context=get_context("spawn"))
        self._teacher = self._judges.submit(_score, bench.held_out.teacher, bench.judged)

    def run(self, name: str, row: Row, grids: Path | None = None) -> None:
        """One row; a picture of its students beside the teacher goes to `grids`."""
        key = dataclasses.replace(row, drawn_bits=None)
        if key not in self._trained:
            programs = self._programs.get(row.program, (None, None))
            self._trained[key] = self.bench.train(row, programs, self._start(row))
        student, error = self._trained[key]
        pictures, found = self.bench.draw(row, student)
        self.figures |= {f"{name}/{measure}": figure for measure, figure in found.items()}
        self._scores[name] = self._judges.submit(_score, pictures, self.bench.judged)
        self.bench.say(
            f"{name}: {found['median_psnr'].value:.2f} dB, relative error {error:.4f}, "
            f"{found['bits'].value:.2f} bits"
        )
        if grids is not None:
            grids.mkdir(parents=True, exist_ok=True)
            chosen = np.linspace(0, len(pictures) - 1, 16).astype(int)
            picture = grid(self.bench.held_out.teacher[chosen], pictures[chosen])
            picture.save(grids / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.png")

    def run_all(
        self, rows: dict[str, Row], *, seeds: int, minutes: float | None, grids: Path | None
    ) -> Iterator[None]:
        """Every row, then the two best with other seeds; yields after each.

        Args:
          rows: by name.
          seeds: how many the best have, their first among them.
          minutes: begin no row after this time.
          grids: as in `run`.
        """
        for name, row in rows.items():
            if self._time_left(name, minutes):
                self.run(name, row, grids)
                yield
        for name in self.best(2, rows):
            for seed in range(1, seeds):
                again = f"{name}, seed {seed}"
                if self._time_left(again, minutes):
                    self.run(again, dataclasses.replace(rows[name], seed=seed), grids)
                    yield

    def _time_left(self, name: str, minutes: float | None) -> bool:
        left = minutes is None or time.perf_counter() - self.bench.start < 60 * minutes
        if not left:
            self.bench.say(f"{name}: no time left")
        return left

    def _start(self, row: Row) -> Flat | None:
        if not row.calibrated:
            return None
        if self._calibrated is None:
            with tempfile.TemporaryDirectory() as folder:
                where = Path(folder) / "out"
                self._calibrated = self.bench.calibrate(where, self._calibration_steps)
            self.bench.say("calibrated")
        return self._calibrated

    def best(self, count: int, rows: dict[str, Row]) -> list[str]:
        """The trained rows nearest to the teacher, drawn with the activations of their training."""
        done = [n for n, row in rows.items() if row.trained and row.drawn_bits is None]
        done = [name for name in done if f"{name}/median_psnr" in self.figures]
        return sorted(done, key=lambda name: -self.figures[f"{name}/median_psnr"].value)[:count]

    def scored(self, *, wait: bool) -> dict[str, Figure]:
        """All figures, with the scores that are there; or with all, which are waited for."""
        figures = dict(self.figures)
        if wait or self._teacher.done():
            reference = self._teacher.result()
            figures["teacher/score"] = Figure(value=reference, unit="share")
            for name, future in self._scores.items():
                if wait or future.done():
                    score = future.result()
                    figures[f"{name}/score"] = Figure(value=score, unit="share")
                    figures[f"{name}/kept"] = Figure(value=score / reference, unit="share")
        return figures

    def close(self) -> None:
        """End the processes that score."""
        self._judges.shutdown()


def combine(paths: list[Path], *, mixed: bool = False) -> Result:
    """One result of several runs of this benchmark that differ in their rows alone; see `joined`.

    Raises:
      UserError: runs of other lengths, or with another teacher's score.
    """
    result = joined(paths, mixed=mixed)
    for path in paths:
        for name, figure in read_result(path).figures.items():
            if "/" not in name or name.startswith("teacher/"):
                value = result.figures[name].value
                if figure.value != value:
                    raise UserError(f"{path}: {name} is {figure.value}, not {value} as in another")
    names = ["teacher", *ROWS]

    def place(name: str) -> tuple[int, str]:
        row, _, seed = name.rpartition("/")[0].partition(", seed ")
        return names.index(row) if row in names else len(names), seed

    figures = {name: result.figures[name] for name in sorted(result.figures, key=place)}
    return dataclasses.replace(result, figures=figures)


def main(
    steps: Annotated[int, typer.Option(help="Training steps of each row.")] = 4000,
    batch: Annotated[int, typer.Option(help="States of a step.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 3e-3,
    calibration_steps: Annotated[int, typer.Option(help="Of each block.")] = 300,
    prompts: Annotated[int, typer.Option(help="Captions to train on.")] = 8192,
    held_out: Annotated[int | None, typer.Option(help="Prompts that are drawn; all 720.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16; float32 is quicker on a CPU.")] = "bfloat16",
    seeds: Annotated[int, typer.Option(help="Seeds of the two best rows.")] = 3,
    only: Annotated[str | None, typer.Option(help="Rows whose name this pattern finds.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no row after this time; write what there is.")
    ] = None,
    combined: Annotated[
        list[Path] | None,
        typer.Option("--combine", help="Train nothing: join these result files of other rows."),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed-commits", help="Join results of several commits, noted at figures."),
    ] = False,
    smoke: Annotated[bool, typer.Option(help="A few steps of a few rows.")] = False,
    out: OutOrNone = None,
    grids: Annotated[Path | None, typer.Option(help="Folder for pictures, if wanted.")] = None,
    commit: Commit = None,
) -> None:
    """Trains and scores every row; prints and writes the table."""
    if combined:
        print(f"written: {combine(combined, mixed=mixed).write(out or RESULTS).name}")
        return
    folder = results_folder(out, {"--smoke": smoke})
    rows = {name: ROWS[name] for name in found_by(only, list(ROWS))}
    if smoke:
        steps, batch, calibration_steps, seeds, prompts, held_out = 2, 2, 2, 1, 16, 6
        names = ("distilled, per channel", "calibrated only", "rounded, per channel")
        rows = {name: ROWS[name] for name in names}
    config = DistillConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup=steps // 20,
        decay=0.6,
        compute_dtype=dtype,
    )
    bench = Bench(config, batch=batch, prompts=prompts, held_out=held_out)
    wanted = {row.program: row for row in rows.values() if row.trained}
    # All at once and before anything runs: a compile that times kernels must be alone.
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        compiled = dict(zip(wanted, pool.map(bench.compile, wanted.values()), strict=True))
    bench.say(f"{len(compiled)} steps compiled")
    runner = Runner(bench, compiled, calibration_steps=calibration_steps)
    counts = {"steps": steps, "batch": batch, "prompts": prompts, "held_out": len(bench.judged)}
    settings = {name: Figure(value=count, unit="count") for name, count in counts.items()}

    def write(figures: dict[str, Figure]) -> None:
        if folder is None:
            return
        result = Result(
            benchmark="distillation",
            device=jax.devices()[0].device_kind,
            figures=figures | settings,
            commit=commit or git_commit(),
        )
        print(f"written: {result.write(folder).name}", flush=True)

    # After each row, so that a run that is stopped has those before.
    for _ in runner.run_all(rows, seeds=seeds, minutes=minutes, grids=grids):
        write(runner.scored(wait=False))
    write(runner.scored(wait=True))
    runner.close()


if __name__ == "__main__":
    run(main)
