"""What a run writes for people: tables, TensorBoard, pictures and the progress bar.

Of several processes only the first writes; the others go through the same motions, since what is
looked at may need them all.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flux_jax import images
from flux_jax.composition.prompts import EvalPrompt
from flux_jax.composition.score import Scores, score_images
from flux_jax.errors import UserError
from flux_jax.files import writing
from ternary.distillation.held_out import Comparison, HeldOut, gap, grid
from ternary.distillation.metrics import Board, Table
from ternary.distillation.run_config import RunConfig
from ternary.distillation.step import Metrics

SHOWN = 16
METRICS = ("step", *Metrics._fields, "states_per_second")
HELD_OUT = ("step", "median_psnr_db", "low_psnr_db", "score", "teacher_score")


class RunLog:
    """One process's part of what a run writes.

    Args:
      out: the run's folder.
      config: settings.
      judged: the held-out prompts with what they claim, or none.
      done: steps that are in a checkpoint; None before the first.
      writes: whether this process is the one that writes.
      progress: whether to show a progress bar on stderr.

    Attributes:
      loss: of the last step that was looked at, by an earlier process if by none of this one.
      held_out: the last row of `held_out.csv`, or nothing.

    Raises:
      UserError: a file that cannot be written; of every method.
    """

    def __init__(
        self,
        out: Path,
        config: RunConfig,
        judged: Sequence[EvalPrompt],
        *,
        done: int | None,
        writes: bool,
        progress: bool,
    ):
        self.loss = float("nan")
        self.held_out: dict[str, Any] = {}
        self._config, self._judged = config, judged
        self._out = out
        self._parts = contextlib.ExitStack()
        self._files: tuple[Table, Table, Board] | None = None
        if writes:
            try:
                with self._writing():
                    self._files = self._open(done)
            except UserError:
                with contextlib.suppress(UserError):
                    self.close()
                raise
        self._bar: tqdm | None = None
        self._shown, self._done = progress and writes, done or 0
        self._since = 0.0

    def _open(self, done: int | None) -> tuple[Table, Table, Board]:
        """The tables, cut back to the last checkpoint; what they say last is known again."""
        step = done or 0
        # The drawing of step 0 is made before any checkpoint.
        last_drawn = -1 if done is None else step
        drawn = Table(self._out / "held_out.csv", HELD_OUT, last_drawn)
        self._parts.callback(drawn.close)
        metrics = Table(self._out / "metrics.csv", METRICS, step)
        self._parts.callback(metrics.close)
        self._forget_pictures(last_drawn)
        board = Board(self._out / "tensorboard", last_drawn)
        self._parts.callback(board.close)
        if metrics.last is not None:
            self.loss = float(metrics.last["loss"])
        if drawn.last is not None:
            cells = drawn.last.items()
            self.held_out = {name: float(cell) if cell else None for name, cell in cells}
        return metrics, drawn, board

    def _forget_pictures(self, last: int) -> None:
        """Removes those of steps that will be taken again, perhaps with other settings."""
        for file in (self._out / "samples").glob("step_*.*"):
            step = file.stem.removeprefix("step_")
            if step.isdecimal() and int(step) > last:
                file.unlink()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._out, "; the run goes on from its last checkpoint")

    def begin(self) -> None:
        """Show the progress bar."""
        bar = tqdm(
            total=self._config.distill.steps,
            initial=self._done,
            unit="step",
            desc="distill",
            disable=not self._shown,
        )
        self._bar = self._parts.enter_context(bar)

    def close(self) -> None:
        """Close the files and the bar."""
        with self._writing():
            self._parts.close()

    def start_clock(self) -> None:
        """What was done since the last steps is no part of the next ones' time."""
        self._since = time.perf_counter()

    def rows(self, done: int, pending: Sequence[Metrics]) -> list[dict[str, Any]]:
        """The metrics of some steps, as rows of `metrics.csv`; waits for them.

        Args:
          done: the last of these steps.
          pending: their metrics.
        """
        values: list[Any] = jax.device_get(list(pending))
        began, self._since = self._since, time.perf_counter()
        states = self._config.batch_size * self._config.distill.accumulate
        speed = len(values) * states / (self._since - began)
        rows: list[dict[str, Any]] = []
        for number, metrics in enumerate(values, done - len(values) + 1):
            row: dict[str, Any] = {"step": number}
            row |= {name: float(np.asarray(value)) for name, value in metrics._asdict().items()}
            row["states_per_second"] = round(speed, 2)
            rows.append(row)
        return rows

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of metrics, and move the bar."""
        self.loss = rows[-1]["loss"]
        if self._files is None:
            return
        metrics, _, board = self._files
        means = {n: float(np.mean([row[n] for row in rows])) for n in METRICS if n != "step"}
        with self._writing():
            metrics.add(rows)
            board.scalars(rows[-1]["step"], {f"train/{name}": v for name, v in means.items()})
        if self._bar is not None:
            self._bar.update(len(rows))
            speed = means["states_per_second"]
            self._bar.set_postfix_str(f"loss {means['loss']:.5f}, {speed:,.0f} states/s")

    def draw(self, step: int, student: Any, pictures: HeldOut) -> None:
        """Held-out pictures of a step: the grid, and how far they are from the teacher's."""
        found = pictures.compare(student)
        scores = {"student": self._score(found.images), "teacher": self._score(pictures.teacher)}
        overall = {name: score and score.overall.passed for name, score in scores.items()}
        self.held_out = {
            "step": step,
            "median_psnr_db": round(found.median_psnr, 3),
            "low_psnr_db": round(float(np.percentile(found.psnr, 10)), 3),
            "score": overall["student"],
            "teacher_score": overall["teacher"],
        }
        if self._files is None:
            return
        _, drawn, board = self._files
        chosen = np.linspace(0, len(found.psnr) - 1, min(SHOWN, len(found.psnr))).astype(int)
        picture = grid(pictures.teacher[chosen], found.images[chosen])
        legend = _legend(step, pictures, found, chosen, scores)
        numbers = {n: v for n, v in self.held_out.items() if n != "step" and v is not None}
        stem = self._out / "samples" / f"step_{step:06d}"
        with self._writing():
            stem.parent.mkdir(exist_ok=True)
            picture.save(stem.with_suffix(".png"))
            stem.with_suffix(".json").write_text(json.dumps(legend, indent=1) + "\n")
            drawn.add([self.held_out])
            board.scalars(step, {f"held_out/{n}": v for n, v in numbers.items()})
            board.image(step, "held_out/teacher_and_student", picture)

    def _score(self, pictures: np.ndarray) -> Scores | None:
        if not self._judged:
            return None
        return score_images(list(images.to_uint8(pictures)), self._judged)


def _legend(
    step: int,
    pictures: HeldOut,
    found: Comparison,
    chosen: np.ndarray,
    scores: Mapping[str, Scores | None],
) -> dict[str, Any]:
    """What a grid shows, pair by pair, and the scores by category; as JSON values."""
    return {
        "step": step,
        "height": found.images.shape[1],
        "width": found.images.shape[2],
        "gap": gap(found.images.shape[1]),
        "shown": [
            {
                "prompt": pictures.embeds.prompts[row],
                "seed": pictures.seeds[row],
                "psnr_db": round(float(found.psnr[row]), 3),
            }
            for row in chosen
        ],
        "scores": {name: score and score.to_dict() for name, score in scores.items()},
    }
