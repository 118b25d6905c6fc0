"""A full-size pipeline of random weights that behaves as a trained one does, written quickly.

Every weight has the deviation of its fan-in, so that activations stay finite through 57 blocks. One
pool of normal numbers is drawn; a tensor is a stretch of it that starts elsewhere for each name.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from convert import tables
from convert.maps import scheduler
from convert.rules import backward_plan
from convert.safetensors_io import write_component
from convert.tensors import Spec, total_bytes
from flux_jax.configs import FluxConfig, SchedulerConfig

SHARD_BYTES = 9_990_000_000
# No multiple of any width, so that no two rows of a weight are alike.
_POOL = (1 << 24) + 1
_BF16 = np.dtype(ml_dtypes.bfloat16)


class ScaledTensors:
    """A reader of random bfloat16 tensors under diffusers' names."""

    def __init__(self, config: FluxConfig):
        table = tables.diffusers_map("transformer", config)
        plan = backward_plan(table, tables.our_shapes("transformer", config))
        self.specs = {a.name: Spec(a.shape, _BF16) for a in plan.assemblies}
        largest = max(math.prod(spec.shape) for spec in self.specs.values())
        random = np.random.default_rng(0)
        self._normal = random.standard_normal(min(_POOL, largest + 1), np.float32)
        self._pools: dict[float, np.ndarray] = {}

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        spec = self.specs[name]
        pool = self._pool(*self._moments(name))
        flat = out.reshape(-1)
        width = math.prod(spec.row_shape)
        start = (zlib.crc32(name.encode()) + row * width) % len(pool)
        done = 0
        while done < len(flat):
            part = pool[start : start + len(flat) - done]
            flat[done : done + len(part)] = part
            done, start = done + len(part), 0

    def _moments(self, name: str) -> tuple[float, float]:
        shape = self.specs[name].shape
        if len(shape) == 2:
            return 0.0, shape[1] ** -0.5
        return (1.0, 0.1) if name.endswith(".weight") else (0.0, 0.02)

    def _pool(self, mean: float, deviation: float) -> np.ndarray:
        if deviation not in self._pools:
            self._pools[deviation] = (mean + deviation * self._normal).astype(_BF16)
        return self._pools[deviation]


def write_pipeline(folder: Path, config: FluxConfig) -> int:
    """A diffusers pipeline of a transformer and a scheduler; returns the transformer's bytes.

    Args:
      folder: to be made.
      config: of the transformer.
    """
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    reader = ScaledTensors(config)
    stem = tables.STEMS["transformer"]
    write_component(folder / "transformer", stem, reader, shard_bytes=SHARD_BYTES)
    content = tables.config_to_hf("transformer", config)
    (folder / "transformer" / "config.json").write_text(json.dumps(content))
    schedule = scheduler.config_to_hf(SchedulerConfig.dev())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = {name: [None, None] for name in tables.CLASSES}
    index |= {"transformer": list(tables.CLASSES["transformer"])}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    content = {"_class_name": "FluxPipeline", **index}
    (folder / "model_index.json").write_text(json.dumps(content))
    return total_bytes(reader)
