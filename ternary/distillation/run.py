"""A distillation run: from a teacher and a prompt file to a ternary checkpoint, resumable.

A run's folder holds all of it: `run.yaml` (the settings), the text embeddings, `metrics.csv` (a
row for every step), `tensorboard/`, `samples/` and `held_out.csv` (teacher | student from the same
noise, from step 0 on), `checkpoints/` and, at the end, `student/`, a whole ternary pipeline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.hub import local_path
from flux_jax import loading
from flux_jax.errors import UserError
from flux_jax.files import claimed, make_folder
from flux_jax.pipeline import FluxPipeline
from flux_jax.processes import Processes
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompts import TextEncoders
from flux_jax.sharding import axis_size
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat
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
    open_folder,
    split_prompts,
)
from ternary.distillation.text_cache import TextTable, cached_embeds
from ternary.distillation.training_state import PATIENCE, StateStore, complete_steps
from ternary.distillation.trajectory import Trajectories
from ternary.storage.saving import save_checkpoint
from ternary.storage.source import weights_crc32

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
    task: Task,
    out: str | Path,
    config: RunConfig,
    *,
    mesh: Mesh | None = None,
    progress: bool = True,
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
    out = local_path(out)
    mesh = config.mesh.make() if mesh is None else mesh
    _check_mesh(mesh, config)
    processes = Processes.here()
    prompts = split_prompts(task, config)
    request = check_task(task, config, resumed=bool(complete_steps(out / CHECKPOINTS)))
    if processes.first:
        make_folder(out)
    with claimed(out) if processes.first else contextlib.nullcontext():
        named = 0
        if processes.first:
            named = weights_crc32(request.path, jnp.dtype(config.distill.compute_dtype))
            open_folder(out, task, config, prompts, named)
        processes.wait("the folder")
        named = int(processes.from_first(np.uint32(named)))
        run = _Run(task, named, request, out, config, prompts, mesh, processes, progress)
        with run.closing():
            return run.go()


def _check_mesh(mesh: Mesh, config: RunConfig) -> None:
    if axis_size(mesh, "sequence") > 1:
        raise UserError("distillation has no mesh axis sequence: use data, fsdp and tensor")
    parts = axis_size(mesh, "data") * axis_size(mesh, "fsdp")
    if config.batch_size % parts:
        raise UserError(
            f"batch_size must be a multiple of the {parts} devices of data and fsdp, "
            f"got {config.batch_size}"
        )


class _Run:
    """One process of a run: what it has in the run's folder, opened and closed."""

    def __init__(
        self,
        task: Task,
        teacher_crc32: int,
        request: loading.Request,
        out: Path,
        config: RunConfig,
        prompts: Prompts,
        mesh: Mesh,
        processes: Processes,
        progress: bool,
    ):
        self.task, self.request, self.out, self.config = task, request, out, config
        self.teacher_crc32 = teacher_crc32
        self.prompts, self.mesh, self.processes = prompts, mesh, processes
        self.store = StateStore(out / CHECKPOINTS, keep=config.checkpoints)
        try:
            self.log = RunLog(
                out,
                config,
                prompts.judged,
                done=self.store.latest,
                writes=processes.first,
                progress=progress,
            )
        except BaseException:
            self.store.close(PATIENCE)
            raise
        self._table: TextTable | None = None

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close all at the end of the block; a run that was stopped says where it goes on."""
        try:
            yield
        except BaseException as error:
            # A failed write was already reported.
            with contextlib.suppress(UserError):
                self._stop(signalled=not isinstance(error, Exception))
            raise
        self._close()

    def _stop(self, *, signalled: bool) -> None:
        # Of several processes some may be gone: a checkpoint that needs all would never be whole.
        # After a signal, bound the wait.
        self._close(store=self.processes.count == 1, patience=PATIENCE if signalled else None)
        if signalled and self.processes.first:
            kept = self.store.describe_latest()
            logger.info("stopped; %s: give the command again to go on", kept)

    def _close(self, *, store: bool = True, patience: float | None = None) -> None:
        with contextlib.ExitStack() as parts:
            if self._table is not None:
                parts.callback(self._table.close)
            if store:
                parts.callback(self.store.close, patience)
            parts.callback(self.log.close)

    def go(self) -> Outcome:
        """Train, and write the student."""
        table = self._table = self._embeds()
        training = _Training(self, table)
        packed = training.go()
        if self.processes.first:
            save_checkpoint(self.out / "student", packed, rest=self.request.path, force=True)
        self.processes.wait("the student")
        drawn = self.log.held_out
        return Outcome(
            student=self.out / "student",
            steps=training.done,
            loss=self.log.loss,
            median_psnr=drawn.get("median_psnr_db"),
            score=drawn.get("score"),
            teacher_score=drawn.get("teacher_score"),
        )

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
            key=f"{self.teacher_crc32:08x} {plan.max_sequence_length}",
            shape=(
                plan.max_sequence_length,
                transformer.context_in_dim,
                transformer.vec_in_dim,
            ),
            processes=self.processes,
        )


class _Training:
    """The models on the mesh, and the steps from the first state, or the last checkpoint's, on.

    Attributes:
      done: steps taken, earlier processes included.
    """

    def __init__(self, run: _Run, table: TextTable):
        config, plan = run.config, run.request.plan
        self._run = run
        self.done = run.store.latest or 0
        dtype = jnp.dtype(config.distill.compute_dtype)
        parts = loading.load_image_parts(run.request.path, dtype=dtype, mesh=run.mesh, given={})
        pipe = FluxPipeline(**parts)
        teacher = pipe.transformer
        self._teacher = split_flat(teacher)[1]
        trajectories = Trajectories(
            config.trajectory,
            pipe.scheduler,
            tokens=plan.token_shape,
            batch_size=config.batch_size,
            prompts=len(run.prompts.train),
        )
        student = abstract_student(teacher, config.quant, config.policy, config.distill)
        self._step = StepFunction(
            teacher, student, config.distill, trajectories, grid=plan.grid, mesh=run.mesh
        )
        self._start = Start(
            self._step,
            teacher,
            student,
            config.quant,
            config.policy,
            seed=config.seed,
            mesh=run.mesh,
        )
        self._feed = PromptFeed(table, trajectories, config.distill.accumulate, run.mesh)
        self._freezer = Freezer(self._step, self._start.shapes.params, run.mesh)
        self._pipe, self._table = pipe, table

    def go(self) -> FluxTransformer:
        """The trained student, packed."""
        run, config, total = self._run, self._run.config, self._run.config.distill.steps
        state = self._first_state()
        self._feed.begin(state.pool, self.done)
        places = self._start.shardings, NamedSharding(run.mesh, PartitionSpec())
        program = jax.jit(self._step, donate_argnums=0, out_shardings=places)
        run.log.begin()
        pending: list[Metrics] = []
        # A process that was killed between a checkpoint and its drawing has left that to us.
        if self._drawing_due() and not self._is_drawn():
            self._draw(state)
        run.log.start_clock()
        while self.done < total:
            state, result = program(state, self._teacher, self._feed.next())
            self.done += 1
            pending.append(result)
            save = self.done == total or self.done % config.checkpoint_every == 0
            look = self._drawing_due()
            if save or look:
                self._look(self.done, pending)
                pending = []
            elif len(pending) > config.log_every:
                # All but the last, which the devices have to do meanwhile.
                self._look(self.done - 1, pending[:-1])
                pending = pending[-1:]
            if save:
                run.store.save(self.done, state)
            if look:
                self._draw(state)
            if save or look:
                run.log.start_clock()
        run.store.wait()
        return self._frozen(state)

    def _first_state(self) -> TrainState:
        """The state to go on from, on the mesh."""
        run, start = self._run, self._start
        if run.store.latest is not None:
            if run.processes.first:
                logger.info("going on from step %d of %d", self.done, run.config.distill.steps)
            return run.store.restore(start.abstract())
        if run.task.start is None:
            state = start.from_teacher()
        else:
            shapes = start.abstract().params
            folder = local_path(run.task.start)
            state = start.from_params(calibrated_start(folder, shapes, run.config))
        lead = jax.jit(self._step.lead, donate_argnums=0, out_shardings=start.shardings.pool)
        pool = state.pool
        for group in range(run.config.trajectory.groups):
            pool = lead(pool, np.int32(group), self._teacher, self._feed.group(pool, group))
        return state._replace(pool=pool)

    @functools.cached_property
    def _pictures(self) -> HeldOut | None:
        """Not before a drawing is due: the teacher takes long, and a bad checkpoint no time."""
        run, config, plan = self._run, self._run.config, self._run.request.plan
        if not run.prompts.held_out:
            return None
        cut = len(run.prompts.train)
        txt, pooled = self._table.take(np.arange(cut, cut + len(run.prompts.held_out)))
        embeds = PromptEmbeds(
            prompts=tuple(run.prompts.held_out),
            prompt_embeds=jnp.asarray(txt),
            pooled_prompt_embeds=jnp.asarray(pooled),
        )
        return HeldOut(
            self._pipe,
            embeds,
            num_inference_steps=config.sampling_steps,
            guidance_scale=config.guidance_scale,
            height=plan.height,
            width=plan.width,
            batch_size=config.sample_batch_size,
        )

    def _frozen(self, state: TrainState) -> FluxTransformer:
        return self._freezer(state.ema or state.params)

    def _draw(self, state: TrainState) -> None:
        if self._pictures is None:
            return
        self._run.log.draw(self.done, self._frozen(state), self._pictures)

    def _drawing_due(self) -> bool:
        """Whether the held-out prompts are drawn after as many steps as are taken."""
        every = self._run.config.sample_every
        return (
            self.done in (0, self._run.config.distill.steps)
            or bool(every)
            and self.done % every == 0
        )

    def _is_drawn(self) -> bool:
        """Whether an earlier process has told of that drawing; the first knows, for all."""
        return bool(
            self._run.processes.from_first(
                np.array(self._run.log.held_out.get("step") == self.done)
            )
        )

    def _look(self, last: int, pending: Sequence[Metrics]) -> None:
        """Report some steps, of which `last` is the last; stop if one is not finite."""
        rows = self._run.log.rows(last, pending)
        # A gradient that is not finite has made the parameters so, which the next loss would show.
        wrong = first_not_finite(rows, ("loss", "grad_norm"))
        if wrong is not None:
            step, what = wrong
            store = self._run.store
            store.wait()
            raise UserError(
                f"the {what} of step {step} is not finite; {store.describe_latest()}. Begin in "
                "another folder with a lower distill.learning_rate or distill.max_grad_norm"
            )
        self._run.log.add(rows)
