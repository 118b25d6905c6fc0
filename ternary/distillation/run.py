"""A distillation run: from a teacher and a prompt file to a ternary checkpoint, resumable.

A run's folder holds all of it: `run.yaml` (the settings), the text embeddings, `metrics.csv` (a
row for every step), `tensorboard/`, `samples/` and `held_out.csv` (teacher | student from the same
noise, from step 0 on), `checkpoints/` and, at the end, `student/`, a whole ternary pipeline.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from flux_jax import images, loading
from flux_jax.composition.score import score_images
from flux_jax.errors import UserError
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompts import PromptEmbeds, TextEncoders
from flux_jax.tree import Flat, split_flat
from ternary.distillation.held_out import Comparison, HeldOut, grid
from ternary.distillation.metrics import Board, Table, first_not_finite
from ternary.distillation.run_config import RunConfig
from ternary.distillation.step import Metrics, PromptSet, StepFunction, TrainState, learning_rate
from ternary.distillation.task import (
    Prompts,
    Task,
    calibrated_start,
    open_folder,
    split_prompts,
)
from ternary.distillation.text_cache import cached_embeds
from ternary.distillation.training_state import StateStore
from ternary.distillation.trajectory import Trajectories
from ternary.storage.checkpoint import save_checkpoint
from ternary.student import freeze_student, make_student

SHOWN = 16
METRICS = ("step", *Metrics._fields, "learning_rate", "states_per_second")
HELD_OUT = ("step", "median_psnr_db", "low_psnr_db", "score", "teacher_score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
      student: folder of the ternary pipeline.
      steps: that were taken, earlier processes included.
      loss: of the last step.
      median_psnr: of the held-out pictures against the teacher's, dB; None without any.
      score, teacher_score: composition, for prompts that have one.
    """

    student: Path
    steps: int
    loss: float
    median_psnr: float | None
    score: float | None
    teacher_score: float | None


def distill(
    task: Task, out: Path, config: RunConfig, *, mesh: Mesh | None = None, progress: bool = True
) -> Outcome:
    """Train a ternary student to a teacher's velocities; goes on where an earlier process ended.

    Args:
      task: teacher and prompts.
      out: the run's folder.
      config: settings; must be those the folder was begun with.
      mesh: devices with an axis "data" over which the states are split; all devices by default.
      progress: whether to show a progress bar on stderr.

    Raises:
      UserError: input that cannot be used, a loss that is not finite, or a disk that is full; the
        last good checkpoint is named.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",)) if mesh is None else mesh
    if config.batch_size % mesh.shape["data"]:
        raise UserError(
            f"batch_size must be a multiple of the {mesh.shape['data']} devices, "
            f"got {config.batch_size}"
        )
    prompts = split_prompts(task, config)
    open_folder(out, task, config)
    run = _Run(task, out, config, prompts, mesh, progress)
    try:
        return run.go()
    finally:
        run.close()


class _Run:
    """One process of a run."""

    def __init__(
        self,
        task: Task,
        out: Path,
        config: RunConfig,
        prompts: Prompts,
        mesh: Mesh,
        progress: bool,
    ):
        self.task, self.out, self.config, self.progress = task, out, config, progress
        self.prompts = prompts
        self.store = StateStore(out / "checkpoints", keep=config.checkpoints)
        self.done = self.store.latest or 0
        self.metrics = Table(out / "metrics.csv", METRICS, self.done)
        # The drawing of step 0 is made before any checkpoint.
        self.drawn = Table(out / "held_out.csv", HELD_OUT, self.done if self.store.latest else -1)
        self.board = Board(out / "tensorboard", self.done)
        self.rate = learning_rate(config.distill)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._rows = NamedSharding(mesh, PartitionSpec(None, "data"))
        self._last: Comparison | None = None
        self._loss = float("nan")

    def close(self) -> None:
        for part in (self.metrics, self.drawn, self.board, self.store):
            part.close()

    def go(self) -> Outcome:
        request = loading.check_request(
            self.task.teacher,
            {
                "height": self.config.height,
                "width": self.config.width,
                "num_inference_steps": self.config.sampling_steps,
                "guidance_scale": self.config.guidance_scale,
                "max_sequence_length": self.config.max_sequence_length,
            },
            images=1,
            num_images_per_prompt=1,
        )
        prompts, held_out = self._embeds(request)
        dtype = jnp.dtype(self.config.distill.compute_dtype)
        pipe = FluxPipeline.from_pretrained(request.path, dtype=dtype, text_encoders=TextEncoders())
        step, state = self._student(pipe, request.plan)
        teacher = jax.device_put(split_flat(pipe.transformer)[1], self._replicated)
        if self.store.latest is not None:
            state = self.store.restore(state)
        else:
            spread = jax.jit(step.spread, donate_argnums=0, out_shardings=self._rows)
            state = state._replace(pool=spread(state.pool, teacher, prompts))
        pictures = (
            HeldOut(
                pipe,
                held_out,
                num_inference_steps=self.config.sampling_steps,
                guidance_scale=self.config.guidance_scale,
                height=request.plan.height,
                width=request.plan.width,
                batch_size=self.config.sample_batch_size,
            )
            if held_out.prompts
            else None
        )
        state = self._train(step, state, teacher, prompts, pictures)
        save_checkpoint(
            self.out / "student", self._module(step, state), rest=request.path, force=True
        )
        return self._outcome()

    def _embeds(self, request: loading.Request) -> tuple[PromptSet, PromptEmbeds]:
        """Training and held-out prompts, encoded; the encoders are loaded only if needed."""
        plan, configs = request.plan, request.configs
        encoders: list[TextEncoders] = []

        def encode(texts: Sequence[str]) -> PromptEmbeds:
            if not encoders:
                encoders.append(TextEncoders.from_pretrained(request.path))
            return encoders[0].encode(
                texts,
                max_sequence_length=plan.max_sequence_length,
                batch_size=min(len(texts), 32),
            )

        transformer = configs["transformer"]
        texts = [*self.prompts.train, *self.prompts.held_out]
        txt, pooled = cached_embeds(
            self.out,
            texts,
            encode,
            key=f"{self.task.teacher} {plan.max_sequence_length}",
            shape=(
                plan.max_sequence_length,
                transformer.context_in_dim,
                transformer.vec_in_dim,
            ),
        )
        cut = len(self.prompts.train)
        held_out = PromptEmbeds(
            prompts=tuple(texts[cut:]),
            prompt_embeds=jnp.asarray(txt[cut:]),
            pooled_prompt_embeds=jnp.asarray(pooled[cut:]),
        )
        both = jax.device_put((txt[:cut], pooled[:cut]), self._replicated)
        return PromptSet(*both), held_out

    def _student(self, pipe: FluxPipeline, plan: Any) -> tuple[StepFunction, TrainState]:
        """The step and the state before the first one, on the mesh."""
        config = self.config
        master = jnp.dtype(config.distill.master_dtype)
        student = make_student(pipe.transformer, config.quant, config.policy, master_dtype=master)
        trajectories = Trajectories(
            config.trajectory,
            pipe.scheduler,
            tokens=plan.token_shape,
            batch_size=config.batch_size,
            prompts=len(self.prompts.train),
        )
        step = StepFunction(pipe.transformer, student, config.distill, trajectories, grid=plan.grid)
        _, params = split_flat(student)
        if self.task.start is not None:
            params = calibrated_start(self.task.start, params, config)
        state = step.start(params, config.seed)
        return step, jax.device_put(state, self._shardings(state))

    def _shardings(self, state: TrainState) -> TrainState:
        everywhere = jax.tree.map(lambda _: self._replicated, state)
        return everywhere._replace(pool=jax.tree.map(lambda _: self._rows, state.pool))

    def _train(
        self,
        step: StepFunction,
        state: TrainState,
        teacher: Flat,
        prompts: PromptSet,
        pictures: HeldOut | None,
    ) -> TrainState:
        config, total = self.config, self.config.distill.steps
        shardings = self._shardings(state)
        metrics = Metrics(*[self._replicated] * len(Metrics._fields))  # type: ignore[arg-type]
        program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics))
        pending: list[Metrics] = []
        with tqdm(
            total=total, initial=self.done, unit="step", desc="distill", disable=not self.progress
        ) as bar:
            if self.done == 0:
                self._draw(0, step, state, pictures)
            since = time.perf_counter()
            while self.done < total:
                state, result = program(state, teacher, prompts)
                self.done += 1
                pending.append(result)
                last = self.done == total
                save = last or self.done % config.checkpoint_every == 0
                draw = last or (config.sample_every and self.done % config.sample_every == 0)
                if save or draw or len(pending) >= config.log_every:
                    self._log(pending, since, bar)
                    pending = []
                if save:
                    self.store.save(self.done, state)
                if draw:
                    self._draw(self.done, step, state, pictures)
                if not pending:
                    since = time.perf_counter()
        self.store.wait()
        return state

    def _log(self, pending: Sequence[Metrics], since: float, bar: tqdm) -> None:
        """Write the rows of the last steps; stop if one is not finite."""
        values: list[Any] = jax.device_get(list(pending))
        states = self.config.batch_size * self.config.distill.accumulate
        speed = len(values) * states / (time.perf_counter() - since)
        first = self.done - len(values) + 1
        rows: list[dict[str, Any]] = []
        for number, metrics in enumerate(values, first):
            row: dict[str, Any] = {"step": number}
            row |= {name: float(np.asarray(value)) for name, value in metrics._asdict().items()}
            # The schedule counts the steps before this one.
            row["learning_rate"] = float(np.asarray(self.rate(number - 1)))
            row["states_per_second"] = round(speed, 2)
            rows.append(row)
        wrong = first_not_finite(rows, "loss")
        if wrong is not None:
            self.store.wait()
            raise UserError(
                f"the loss of step {wrong} is not finite; {self.store.describe_latest()}. Lower "
                "distill.learning_rate or distill.max_grad_norm"
            )
        self.metrics.add(rows)
        means = {n: float(np.mean([row[n] for row in rows])) for n in METRICS if n != "step"}
        self.board.scalars(self.done, {f"train/{name}": v for name, v in means.items()})
        self._loss = rows[-1]["loss"]
        bar.update(len(rows))
        bar.set_postfix_str(f"loss {means['loss']:.5f}, {speed:,.0f} states/s")

    def _module(self, step: StepFunction, state: TrainState) -> Any:
        """The ternary transformer that a state stands for, on the first device."""
        one = jax.devices()[0]
        params = jax.device_put(state.ema or state.params, one)
        return freeze_student(step.student(params))

    def _draw(
        self, number: int, step: StepFunction, state: TrainState, pictures: HeldOut | None
    ) -> None:
        """Held-out pictures of this step: the grid, and how far they are from the teacher's."""
        if pictures is None:
            return
        found = pictures.compare(self._module(step, state))
        teacher_score = None
        if self.prompts.judged:
            found = dataclasses.replace(found, score=self._score(found.images))
            teacher_score = self._score(pictures.teacher)
        self._last, self._teacher_score = found, teacher_score
        chosen = np.linspace(0, len(found.psnr) - 1, min(SHOWN, len(found.psnr))).astype(int)
        picture = grid(pictures.teacher[chosen], found.images[chosen])
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step_{number:06d}.png")
        row: Mapping[str, Any] = {
            "step": number,
            "median_psnr_db": round(found.median_psnr, 3),
            "low_psnr_db": round(float(np.percentile(found.psnr, 10)), 3),
            "score": found.score,
            "teacher_score": teacher_score,
        }
        self.drawn.add([row])
        scalars = {f"held_out/{n}": v for n, v in row.items() if n != "step" and v is not None}
        self.board.scalars(number, scalars)
        self.board.image(number, "held_out/teacher_and_student", picture)

    def _score(self, pictures: np.ndarray) -> float:
        return score_images(list(images.to_uint8(pictures)), self.prompts.judged).overall.passed

    def _outcome(self) -> Outcome:
        found = self._last
        return Outcome(
            student=self.out / "student",
            steps=self.done,
            loss=self._loss,
            median_psnr=None if found is None else found.median_psnr,
            score=None if found is None else found.score,
            teacher_score=None if found is None else self._teacher_score,
        )
