"""Block-by-block calibration: a ternary transformer from prompts alone, a block at a time.

Block b's student sees what the student's blocks before it made of a state; its target is what the
teacher's block b made of the teacher's own stream. So each block also mends what came before it.
Only the block in training is on the device, beside the teacher's next one: for the memory see
`ternary.calibration.block_training`, for the method `docs/ternary_calibration.md`.

What is finished lies in a folder, from which a run that was killed goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.tree import Flat
from ternary.calibration.block_training import PartPrograms, output_weights
from ternary.calibration.plan import check_prompts, make_plan
from ternary.calibration.progress import PartReport, Progress
from ternary.calibration.states import (
    Samples,
    draw_samples,
    embedder_inputs,
    on_host,
    positions,
)
from ternary.calibration.streaming import (
    HostWeights,
    Part,
    Streams,
    pass_part,
    send,
    stream,
)
from ternary.config import CalibrateConfig, QuantConfig
from ternary.distillation.step import PromptSet
from ternary.policy import Policy


class Listener:
    """Is told how far a calibration is; does nothing by itself."""

    def on_weights(self, done: int, total: int) -> None:
        """Bytes of the teacher's weights read, of how many."""

    def on_states(self, done: int, total: int) -> None:
        """Parts of the teacher passed for the trajectories, of how many."""

    def on_step(self, part: Part, step: int, loss: float) -> None:
        """A training step was taken; `loss` was before it."""

    def on_part(self, part: Part, report: PartReport) -> None:
        """A part is trained, or was by an earlier run."""


class Calibrator:
    """One calibration.

    Args:
      weights: the teacher, in host memory, of the compute dtype.
      scheduler: its noise schedule.
      prompts: encoded, on the host or a device.
      grid: image tokens (rows, columns).
      quant, policy: how the student is made of the teacher.
      config: how it is trained.
      progress: where finished parts are kept.

    Raises:
      UserError: see `make_plan`, or prompts of other widths than the model's.
    """

    def __init__(
        self,
        weights: HostWeights,
        scheduler: SchedulerConfig,
        prompts: PromptSet,
        grid: tuple[int, int],
        quant: QuantConfig,
        policy: Policy,
        config: CalibrateConfig,
        progress: Progress,
    ):
        check_prompts(weights.config, prompts)
        self.weights = weights
        self.scheduler = scheduler
        self.prompts = on_host(prompts)
        self.grid = grid
        self.config = config
        self.progress = progress
        self.plan = make_plan(weights.config, weights.shapes(), policy, config, rank=quant.rank)
        rotation = positions(weights, grid, prompts.txt.shape[1])
        self.programs = PartPrograms(weights.config, quant, config, rotation)

    def samples(self, listener: Listener) -> Samples:
        """The states, drawn or from an earlier run."""
        stored = self.progress.read_samples()
        if stored is not None:
            return stored
        samples = draw_samples(
            self.weights,
            self.programs,
            self.scheduler,
            self.prompts,
            self.grid,
            self.config,
            listener.on_states,
        )
        self.progress.write_samples(samples)
        return samples

    def run(self, listener: Listener | None = None) -> dict[str, PartReport]:
        """Train every part of the plan that is not finished yet.

        Returns:
          The reports of all trained parts by name.

        Raises:
          UserError: a loss that is not finite, or a folder that cannot be written to.
        """
        listener = listener or Listener()
        trained = self.plan.trained
        if not trained or self.progress.finished() >= set(trained):
            return {name: self.progress.report(name) for name in trained}
        samples = self.samples(listener)
        names = [part.name for part in self.weights.parts]
        count = names.index(trained[-1]) + 1
        run = _Pass(self, samples, listener)
        stream(self.weights.parts[:count], lambda part: send(self.weights.part(part)), run.use)
        return {name: self.progress.report(name) for name in trained}

    def student(self, part: Part, teacher: Flat | None = None) -> Flat:
        """A part's parameters as the student has them: trained, or rounded from the teacher's."""
        if part.name in self.plan.trained and part.name in self.progress.finished():
            return send(self.progress.read(part))
        if teacher is None:
            teacher = send(self.weights.part(part))
        return self.programs.start(teacher, self.plan.layers[part.name])


class _Pass:
    """Both streams on their way through the parts."""

    def __init__(self, owner: Calibrator, samples: Samples, listener: Listener):
        self.owner = owner
        self.samples = samples
        self.listener = listener
        size = owner.config.batch_size
        self.teacher = Streams(len(samples.x), size)
        self.student = Streams(len(samples.x), size)
        blocks = [part.name for part in owner.weights.parts if part.kind in ("double", "single")]
        self.last_block = blocks[-1] if blocks else ""

    def inputs(self, streams: Streams, part: Part, rows: Int[np.ndarray, " B"]) -> Flat:
        if part.kind == "embed":
            return embedder_inputs(self.samples, self.owner.prompts, rows)
        return streams.rows(rows)

    def use(self, part: Part, teacher: Flat) -> None:
        """Bring both streams past a part, training it if it is its turn."""
        owner = self.owner
        self._advance(self.teacher, part, (), teacher)
        layers = owner.plan.layers[part.name]
        params = owner.student(part, teacher)
        if part.name in owner.plan.trained:
            if part.name not in owner.progress.finished():
                params, report = self._train(part, layers, params)
                owner.progress.write(part, params, report)
            self.listener.on_part(part, owner.progress.report(part.name))
        self._advance(self.student, part, layers, params)

    def _advance(self, streams: Streams, part: Part, layers: Sequence[str], params: Flat) -> None:
        pass_part(
            streams,
            lambda number: self.inputs(streams, part, streams.batches[number]),
            lambda batch: self.owner.programs.forward(part, layers, params, batch),
        )

    def _targets(self, names: Sequence[str], rows: Int[np.ndarray, " B"]) -> dict[str, Any]:
        found = self.teacher.rows(rows)
        return {name: found[name] for name in names}

    def _error(self, part: Part, layers: Sequence[str], params: Flat, weights: Any) -> float:
        """The mean loss over all samples."""
        losses: list[Any] = []
        for rows in self.student.batches:
            inputs = self.inputs(self.student, part, rows)
            outputs = self.owner.programs.forward(part, layers, params, inputs)
            targets = self._targets(list(weights), rows)
            losses.append(self.owner.programs.measure(outputs, targets, weights))
            # One behind: batches that wait for the device would fill it.
            losses[-2:-1] = [np.asarray(loss) for loss in losses[-2:-1]]
        return float(np.concatenate(losses)[: self.student.count].astype(np.float64).mean())

    def _train(self, part: Part, layers: Sequence[str], params: Flat) -> tuple[Flat, PartReport]:
        owner, programs, config = self.owner, self.owner.programs, self.owner.config
        weights = output_weights(part, last_block=part.name == self.last_block)
        began = time.perf_counter()
        before = self._error(part, layers, params, weights)
        number = [p.name for p in owner.weights.parts].index(part.name)
        order = _Order(self.student.count, config.batch_size, [config.seed, 1, number])
        state: Any = (params, programs.start_optimizer(params))
        del params
        losses: list[float] = []
        waiting = None
        for _ in range(config.steps):
            rows = order.next()
            state, loss = programs.step(
                part,
                layers,
                state,
                self.inputs(self.student, part, rows),
                self._targets(list(weights), rows),
                weights,
            )
            # One behind, so that the device has work while the host waits for a number.
            if waiting is not None:
                self._note(part, losses, waiting)
            waiting = loss
        self._note(part, losses, waiting)
        params = state[0]
        after = self._error(part, layers, params, weights)
        if not np.isfinite(after):
            self._refuse(part, config.steps, after)
        seconds = time.perf_counter() - began
        return params, PartReport(before=before, after=after, seconds=seconds)

    def _note(self, part: Part, losses: list[float], loss: Any) -> None:
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            self._refuse(part, len(losses) - 1, losses[-1])
        self.listener.on_step(part, len(losses), losses[-1])

    def _refuse(self, part: Part, step: int, loss: float) -> None:
        raise UserError(
            f"calibration of {part.name} stopped: the loss is {loss} at step {step}; lower the "
            f"learning rate (now {self.owner.config.learning_rate:g}); finished parts are kept in "
            f"{self.owner.progress.folder}"
        )


class _Order:
    """Rows of one batch after another: all samples in a random order, then in another."""

    def __init__(self, count: int, size: int, seed: Sequence[int]):
        self._random = np.random.default_rng(seed)
        self._count, self._size = count, size
        self._rows = np.zeros(0, np.int64)

    def next(self) -> Int[np.ndarray, " B"]:
        while len(self._rows) < self._size:
            self._rows = np.concatenate([self._rows, self._random.permutation(self._count)])
        rows, self._rows = np.split(self._rows, [self._size])
        return rows
