"""A student's ternary layers by block, and how far each is from the teacher's weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from convert.hub import local_path
from flux_jax.assets import SHIPPED
from ternary.storage.checkpoint import open_checkpoint
from ternary.storage.format import WEIGHT
from ternary.storage.inspection import LayerReport, Report, inspect_checkpoint
from ternary.storage.pack import quantize_weight
from ternary.storage.source import open_pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a layer's ternary weight is from the teacher's weight w.

    Attributes:
      student: `norm(w - student) / norm(w)`.
      rounded: the same for w rounded by the absolute mean, at the student's granularity.
    """

    student: float
    rounded: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """The layers of one block.

    Attributes:
      name: as "double_blocks.0"; "rest" for the layers outside the blocks.
      layers: of the block, in order.
      zeros: share of the block's ternary weights that are 0.
    """

    name: str
    layers: tuple[LayerReport, ...]
    zeros: float

    @property
    def short(self) -> str:
        """As "D0" for a double block, "S0" for a single one."""
        kind, _, number = self.name.partition("_blocks.")
        return kind[0].upper() + number if number else self.name


def blocks(report: Report) -> list[Block]:
    """The layers of a report by block, in its order; those outside the blocks last."""
    found: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        parts = layer.name.split(".")
        name = ".".join(parts[:2]) if parts[0].endswith("_blocks") else "rest"
        found.setdefault(name, []).append(layer)
    if "rest" in found:
        found["rest"] = found.pop("rest")
    return [
        Block(
            name=name,
            layers=tuple(layers),
            zeros=sum(layer.zeros * math.prod(layer.shape) for layer in layers)
            / sum(math.prod(layer.shape) for layer in layers),
        )
        for name, layers in found.items()
    ]


def inspect_student(
    student: Path,
    teacher: str | None,
    *,
    on_layer: Callable[[int], None] = lambda total: None,
) -> tuple[Report, dict[str, Distance]]:
    """A student's layers, and how far each is from its teacher's.

    Args:
      student: a ternary pipeline.
      teacher: as it was named to `distill`; it is read only if it lies on this machine.
      on_layer: told the number of looks at a layer before each one.

    Raises:
      UserError: either is damaged. Layers of another shape have no distance.
    """
    with open_checkpoint(student) as checkpoint:
        local = teacher is not None and (teacher in SHIPPED or local_path(teacher).exists())
        total = len(checkpoint.layers) * (2 if local else 1)
        found: dict[str, Distance] = {}
        if local:
            assert teacher is not None
            granularity = checkpoint.description.quant.granularity
            with open_pipeline(teacher) as pipeline:
                for name in checkpoint.layers:
                    on_layer(total)
                    if pipeline.shapes.get(name + WEIGHT) == checkpoint.shapes[name + WEIGHT]:
                        found[name] = _distance(
                            pipeline.read(name + WEIGHT),
                            checkpoint.dense(name + WEIGHT),
                            granularity,
                        )
    return inspect_checkpoint(student, on_layer=lambda _: on_layer(total)), found


def _distance(weight: np.ndarray, student: np.ndarray, granularity: str) -> Distance:
    wide = weight.astype(np.float32)
    norm = float(np.linalg.norm(wide))
    apart = float(np.linalg.norm(wide - student.astype(np.float32)))
    rounded = quantize_weight(weight, granularity)
    return Distance(student=apart / norm if norm else 0.0, rounded=rounded.relative_error)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest."""
    return float(np.mean(values)), float(min(values)), float(max(values))
