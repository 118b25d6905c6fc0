"""Ternary weights: quantiser, layers, formats, checkpoints, `python -m ternary`.

The public names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ternary.calibration.run import calibrate_checkpoint as calibrate_checkpoint
    from ternary.config import CalibrateConfig as CalibrateConfig
    from ternary.config import DistillConfig as DistillConfig
    from ternary.config import QuantConfig as QuantConfig
    from ternary.config import TrajectoryConfig as TrajectoryConfig
    from ternary.distillation.run import Outcome as Outcome
    from ternary.distillation.run import distill as distill
    from ternary.distillation.run_config import RunConfig as RunConfig
    from ternary.distillation.task import Task as Task
    from ternary.layers import FakeTernaryLinear as FakeTernaryLinear
    from ternary.layers import TernaryLinear as TernaryLinear
    from ternary.policy import Policy as Policy
    from ternary.storage.inspection import inspect_checkpoint as inspect_checkpoint
    from ternary.storage.rounding import quantize_checkpoint as quantize_checkpoint
    from ternary.storage.saving import save_checkpoint as save_checkpoint
    from ternary.student import freeze_student as freeze_student
    from ternary.student import make_student as make_student

_HOME = {
    "CalibrateConfig": "config",
    "DistillConfig": "config",
    "FakeTernaryLinear": "layers",
    "Outcome": "distillation.run",
    "Policy": "policy",
    "QuantConfig": "config",
    "RunConfig": "distillation.run_config",
    "Task": "distillation.task",
    "TernaryLinear": "layers",
    "TrajectoryConfig": "config",
    "calibrate_checkpoint": "calibration.run",
    "distill": "distillation.run",
    "freeze_student": "student",
    "inspect_checkpoint": "storage.inspection",
    "make_student": "student",
    "quantize_checkpoint": "storage.rounding",
    "save_checkpoint": "storage.saving",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
