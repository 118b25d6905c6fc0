"""A distillation run: from a teacher and a prompt file to a ternary checkpoint, resumable.

A run's folder holds all of it: `run.yaml` (the settings), the text embeddings, `metrics.csv` (a
row for every step), `tensorboard/`, `samples/` and `held_out.csv` (teacher | student from the same
noise, from step 0 on), `checkpoints/` and, at the end, `student/`, a whole ternary pipeline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flux_jax import loading
from flux_jax.errors import UserError
from flux_jax.files import claimed, make_folder
from flux_jax.pipeline import FluxPipeline
from flux_jax.processes import Processes
from flux_jax.prompts import PromptEmbeds, TextEncoders
from flux_jax.sharding import axis_size
from flux_jax.tree import Flat, split_flat
from ternary.distillation.held_out import HeldOut
from ternary.distillation.metrics import first_not_finite
from ternary.distillation.placement import Freezer, Start, abstract_student
from ternary.distillation.prompt_feed import PromptFeed
from ternary.distillation.run_config import RunConfig
from ternary.distillation.run_log import RunLog
from ternary.distillation.step import Metrics, StepFunction, TrainState
from ternary.distillation.task import (
    CHECKPOINTS,
    Prompts,
    Task,
    calibrated_start,
    check_task,
    one_spelling,
    open_folder,
    split_prompts,
)
from ternary.distillation.text_cache import TextTable, cached_embeds
from ternary.distillation.training_state import PATIENCE, StateStore, complete_steps
from ternary.distillation.trajectory import Trajectories
from ternary.storage.files import weights_crc32
from ternary.storage.saving import save_checkpoint

logger = logging.getLogger(__name__)


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

    Every process of a job calls it, with one folder that all can reach.

    Args:
      task: teacher and prompts.
      out: the run's folder.
      config: settings; must be those the folder was begun with, but for the mesh.
      mesh: devices with axes of `flux_jax.sharding.MESH_AXES`; by default that of the settings.
      progress: whether to show a progress bar on stderr.

    Raises:
      UserError: input that cannot be used, another run in the folder, a loss or gradient that is
        not finite, or a disk that is full; the last good checkpoint is named.
    """
    mesh = config.mesh.make() if mesh is None else mesh
    if axis_size(mesh, "sequence") > 1:
        raise UserError("distillation has no mesh axis sequence: use data, fsdp and tensor")
    parts = axis_size(mesh, "data") * axis_size(mesh, "fsdp")
    if config.batch_size % parts:
        raise UserError(
            f"batch_size must be a multiple of the {parts} devices of data and fsdp, "
            f"got {config.batch_size}"
        )
    processes = Processes.here()
    prompts = split_prompts(task, config)
    request = check_task(task, config, resumed=bool(complete_steps(out / CHECKPOINTS)))
    if processes.first:
        make_folder(out)
    with claimed(out) if processes.first else contextlib.nullcontext():
        named, by_weights = 0, True
        if processes.first:
            named = weights_crc32(request.path, jnp.dtype(config.distill.compute_dtype))
            by_weights = open_folder(out, task, config, prompts, named)
        processes.wait("the folder")
        named, by_weights = map(int, processes.from_first(np.array([named, by_weights], np.uint32)))
        teacher = f"{named:08x}" if by_weights else one_spelling(task.teacher)
        run = _Run(task, teacher, request, out, config, prompts, mesh, processes, progress)
        try:
            outcome = run.go()
        except BaseException as error:
            # What it could not write is told already, by `error` if by nobody else.
            with contextlib.suppress(UserError):
                # With others, which may be gone, there is nothing to wait for; who has sent a
                # signal does not wait for long.
                asked = not isinstance(error, Exception)
                run.close(store=processes.count == 1, patience=PATIENCE if asked else None)
                if asked and processes.first:
                    kept = run.store.describe_latest()
                    logger.info("stopped; %s: give the command again to go on", kept)
            raise
        run.close()
    return outcome


class _Run:
    """One process of a run."""

    def __init__(
        self,
        task: Task,
        teacher: str,
        request: loading.Request,
        out: Path,
        config: RunConfig,
        prompts: Prompts,
        mesh: Mesh,
        processes: Processes,
        progress: bool,
    ):
        self.task, self.request, self.out, self.config = task, request, out, config
        # What its texts' embeddings are known by.
        self.teacher = teacher
        self.prompts, self.mesh, self.processes = prompts, mesh, processes
        self.store = StateStore(out / CHECKPOINTS, keep=config.checkpoints)
        self.resumed = self.store.latest is not None
        self.done = self.store.latest or 0
        try:
            self.log = RunLog(
                out,
                config,
                prompts.judged,
                done=self.store.latest,
                writes=processes.first,
                progress=progress,
            )
        except UserError:
            self.store.close()
            raise
        self._table: TextTable | None = None

    def close(self, *, store: bool = True, patience: float | None = None) -> None:
        with contextlib.ExitStack() as parts:
            if self._table is not None:
                parts.callback(self._table.close)
            if store:
                parts.callback(self.store.close, patience)
            parts.callback(self.log.close)

    def go(self) -> Outcome:
        config, request = self.config, self.request
        plan = request.plan
        table = self._table = self._embeds()
        dtype = jnp.dtype(config.distill.compute_dtype)
        parts = loading.load_image_parts(request.path, dtype=dtype, mesh=self.mesh, given={})
        pipe = FluxPipeline(**parts)
        teacher = split_flat(pipe.transformer)[1]
        trajectories = Trajectories(
            config.trajectory,
            pipe.scheduler,
            tokens=plan.token_shape,
            batch_size=config.batch_size,
            prompts=len(self.prompts.train),
        )
        student = abstract_student(pipe.transformer, config.quant, config.policy, config.distill)
        step = StepFunction(
            pipe.transformer, student, config.distill, trajectories, grid=plan.grid, mesh=self.mesh
        )
        start = Start(
            step,
            pipe.transformer,
            student,
            config.quant,
            config.policy,
            seed=config.seed,
            mesh=self.mesh,
        )
        feed = PromptFeed(table, trajectories, config.distill.accumulate, self.mesh)
        freezer = Freezer(step, start.shapes.params, self.mesh)
        state = self._state(step, start, teacher, feed)
        feed.begin(state.pool, self.done)
        pictures = self._pictures(pipe, table, plan)
        state = self._train(step, start, state, teacher, feed, freezer, pictures)
        packed = freezer(state.ema or state.params)
        if self.processes.first:
            save_checkpoint(self.out / "student", packed, rest=request.path, force=True)
        self.processes.wait("the student")
        return self._outcome()

    def _embeds(self) -> TextTable:
        """Training and held-out prompts, encoded; the encoders are loaded only if needed."""
        request = self.request
        plan, transformer = request.plan, request.configs["transformer"]
        encoders: list[TextEncoders] = []

        def encode(texts: Sequence[str]) -> PromptEmbeds:
            if not encoders:
                encoders.append(TextEncoders.from_pretrained(request.path))
            return encoders[0].encode(
                texts,
                max_sequence_length=plan.max_sequence_length,
                batch_size=min(len(texts), 32),
            )

        return cached_embeds(
            self.out,
            [*self.prompts.train, *self.prompts.held_out],
            encode,
            key=f"{self.teacher} {plan.max_sequence_length}",
            shape=(
                plan.max_sequence_length,
                transformer.context_in_dim,
                transformer.vec_in_dim,
            ),
            processes=self.processes,
        )

    def _state(
        self, step: StepFunction, start: Start, teacher: Flat, feed: PromptFeed
    ) -> TrainState:
        """The state to go on from, on the mesh."""
        if self.resumed:
            if self.processes.first:
                logger.info("going on from step %d of %d", self.done, self.config.distill.steps)
            return self.store.restore(start.abstract())
        if self.task.start is None:
            state = start.from_teacher()
        else:
            shapes = start.abstract().params
            state = start.from_params(calibrated_start(self.task.start, shapes, self.config))
        lead = jax.jit(step.lead, donate_argnums=0, out_shardings=start.shardings.pool)
        pool = state.pool
        for group in range(self.config.trajectory.groups):
            pool = lead(pool, np.int32(group), teacher, feed.group(pool, group))
        return state._replace(pool=pool)

    def _pictures(self, pipe: FluxPipeline, table: TextTable, plan: Any) -> HeldOut | None:
        if not self.prompts.held_out:
            return None
        cut = len(self.prompts.train)
        txt, pooled = table.take(np.arange(cut, cut + len(self.prompts.held_out)))
        embeds = PromptEmbeds(
            prompts=tuple(self.prompts.held_out),
            prompt_embeds=jnp.asarray(txt),
            pooled_prompt_embeds=jnp.asarray(pooled),
        )
        return HeldOut(
            pipe,
            embeds,
            num_inference_steps=self.config.sampling_steps,
            guidance_scale=self.config.guidance_scale,
            height=plan.height,
            width=plan.width,
            batch_size=self.config.sample_batch_size,
        )

    def _train(
        self,
        step: StepFunction,
        start: Start,
        state: TrainState,
        teacher: Flat,
        feed: PromptFeed,
        freezer: Freezer,
        pictures: HeldOut | None,
    ) -> TrainState:
        config, total = self.config, self.config.distill.steps
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        program = jax.jit(step, donate_argnums=0, out_shardings=(start.shardings, everywhere))

        def draw(state: TrainState) -> None:
            if pictures is None:
                return
            self.log.draw(self.done, freezer(state.ema or state.params), pictures)
            # Modules that nnx has put together are reference cycles: a student of 3 GB would stay
            # on every device, one for each drawing.
            gc.collect()

        self.log.begin()
        pending: list[Metrics] = []
        # A process that was killed between a checkpoint and its drawing has left that to us.
        if self._drawing_due() and not self._is_drawn():
            draw(state)
        since = time.perf_counter()
        while self.done < total:
            state, result = program(state, teacher, feed.next())
            self.done += 1
            pending.append(result)
            save = self.done == total or self.done % config.checkpoint_every == 0
            look = self._drawing_due()
            if save or look or len(pending) >= config.log_every:
                self._look(pending, since)
                pending = []
            if save:
                self.store.save(self.done, state)
            if look:
                draw(state)
            if not pending:
                since = time.perf_counter()
        self.store.wait()
        return state

    def _drawing_due(self) -> bool:
        """Whether the held-out prompts are drawn after as many steps as are taken."""
        every = self.config.sample_every
        return self.done in (0, self.config.distill.steps) or bool(every) and self.done % every == 0

    def _is_drawn(self) -> bool:
        """Whether an earlier process has told of that drawing; the first knows, for all."""
        return bool(self.processes.from_first(np.array(self.log.held_out.get("step") == self.done)))

    def _look(self, pending: Sequence[Metrics], since: float) -> None:
        """Report the last steps; stop if one is not finite."""
        rows = self.log.rows(self.done, pending, since)
        # A gradient that is not finite has made the parameters so, which the next loss would show.
        wrong = first_not_finite(rows, ("loss", "grad_norm"))
        if wrong is not None:
            step, what = wrong
            self.store.wait()
            raise UserError(
                f"the {what} of step {step} is not finite; {self.store.describe_latest()}. Begin "
                "in another folder with a lower distill.learning_rate or distill.max_grad_norm"
            )
        self.log.add(rows)

    def _outcome(self) -> Outcome:
        found = self.log.held_out
        return Outcome(
            student=self.out / "student",
            steps=self.done,
            loss=self.log.loss,
            median_psnr=found.get("median_psnr_db"),
            score=found.get("score"),
            teacher_score=found.get("teacher_score"),
        )
