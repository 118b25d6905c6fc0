"""The students that `benchmarks.distillation` makes: each differs from the first in one choice."""

from __future__ import annotations

import dataclasses
from typing import Any

from ternary.config import QuantConfig, TrajectoryConfig
from ternary.policy import Policy

# 98 % of the tiny model's parameters: its embedders of scalars are a larger share than FLUX.1's.
POLICY = Policy(
    include=("double_blocks.*", "single_blocks.*", "time_in.*", "guidance_in.*", "vector_in.*")
)
BASE = QuantConfig(refit_steps=3, learned_scale=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One student.

    Attributes:
      quant: its layers.
      trajectory: where its states came from.
      calibrated: whether it started from block-by-block calibration.
      trained: whether it was distilled.
      drawn_bits: activation bits when its pictures are drawn, if not those it was trained with.
      seed: of the training.
    """

    quant: QuantConfig = BASE
    trajectory: TrajectoryConfig = TrajectoryConfig()
    calibrated: bool = False
    trained: bool = True
    drawn_bits: int | None = None
    seed: int = 0

    @property
    def program(self) -> tuple[Any, ...]:
        """What decides the compiled step."""
        return self.quant, self.trajectory


def _rounded(granularity: str) -> Row:
    return Row(quant=QuantConfig(granularity=granularity), trained=False)


def _with(**changes: Any) -> Row:
    return Row(quant=dataclasses.replace(BASE, **changes))


ROWS: dict[str, Row] = {
    "distilled, per channel": Row(),
    "distilled, per tensor": _with(granularity="tensor"),
    "distilled, group of 128": _with(granularity="group128"),
    "distilled, teacher's states only": Row(trajectory=TrajectoryConfig(on_policy=0.0)),
    "distilled, half of the states on policy": Row(trajectory=TrajectoryConfig(on_policy=0.5)),
    "distilled, low-rank branch of 8": _with(rank=8),
    "distilled, scale not learned": _with(learned_scale=False),
    "distilled, absolute-mean start": _with(refit_steps=0),
    "distilled with 8-bit activations": _with(activation_bits=8),
    "distilled, then drawn with 8-bit activations": Row(drawn_bits=8),
    "calibrated only": Row(calibrated=True, trained=False),
    "calibrated, then distilled": Row(calibrated=True),
    "rounded, per tensor": _rounded("tensor"),
    "rounded, per channel": _rounded("channel"),
    "rounded, group of 128": _rounded("group128"),
}
