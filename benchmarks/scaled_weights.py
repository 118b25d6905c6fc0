"""Full-size pipelines of random weights that behave as trained ones do, written quickly.

Every weight has the deviation of its fan-in, so that activations stay finite through 57 blocks. One
pool of normal numbers is drawn; a tensor is a stretch of it that starts elsewhere for each name.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import tables
from convert.maps import scheduler
from convert.plan import backward_plan
from convert.safetensors_write import write_component
from convert.tensors import Spec, total_bytes
from flux_jax.assets import shipped_path
from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.linears import linears
from flux_jax.tokenization import DEV_TOKENS
from ternary.config import QuantConfig
from ternary.policy import Policy, select
from ternary.storage.base3 import pack_base3
from ternary.storage.checkpoint import dense_shapes
from ternary.storage.format import CODES, expected_tensors
from ternary.storage.saving import write_transformer

SHARD_BYTES = 9_990_000_000
# No multiple of any width, so that no two rows of a weight are alike.
_POOL = (1 << 24) + 1
_BF16 = np.dtype(ml_dtypes.bfloat16)
# Different rows of a ternary weight.
_ROWS = 512
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Pool:
    """Normal numbers, scaled and rounded once for each deviation."""

    def __init__(self, size: int):
        self._normal = np.random.default_rng(0).standard_normal(min(_POOL, size + 1), np.float32)
        self._pools: dict[tuple[float, float], np.ndarray] = {}

    def fill(self, name: str, start: int, out: np.ndarray, moments: tuple[float, float]) -> None:
        """The numbers from `start` on of a tensor.

        Args:
          name: of the tensor.
          start: of them are before these.
          out: bfloat16, to be filled.
          moments: mean and deviation.
        """
        if moments not in self._pools:
            mean, deviation = moments
            self._pools[moments] = (mean + deviation * self._normal).astype(_BF16)
        pool, flat = self._pools[moments], out.reshape(-1)
        start = (zlib.crc32(name.encode()) + start) % len(pool)
        done = 0
        while done < len(flat):
            part = pool[start : start + len(flat) - done]
            flat[done : done + len(part)] = part
            done, start = done + len(part), 0


def moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor: vectors of scales are near one, biases near zero."""
    if len(shape) > 1:
        return 0.0, math.prod(shape[1:]) ** -0.5
    return (1.0, 0.1) if name.endswith((".weight", ".scale")) else (0.0, 0.02)


class ScaledTensors:
    """A reader of a component's random bfloat16 tensors under diffusers' names."""

    def __init__(self, config: Any, component: str = "transformer"):
        table = tables.diffusers_map(component, config)
        plan = backward_plan(table, tables.our_shapes(component, config))
        self.specs = {a.name: Spec(a.shape, _BF16) for a in plan.assemblies}
        self._pool = Pool(max(math.prod(spec.shape) for spec in self.specs.values()))

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        spec = self.specs[name]
        start = row * math.prod(spec.row_shape)
        self._pool.fill(name, start, out, moments(name, spec.shape))


def write_component_folder(folder: Path, name: str, config: Any) -> int:
    """A component in diffusers' layout; returns the bytes of its tensors."""
    (folder / name).mkdir(parents=True)
    reader = ScaledTensors(config, name)
    write_component(folder / name, tables.STEMS[name], reader, shard_bytes=SHARD_BYTES)
    content = tables.config_to_hf(name, config)
    (folder / name / "config.json").write_text(json.dumps(content))
    return total_bytes(reader)


def write_pipeline(folder: Path, config: FluxConfig) -> int:
    """A diffusers pipeline of a transformer and a scheduler; returns the transformer's bytes.

    Args:
      folder: to be made.
      config: of the transformer.
    """
    nbytes = write_component_folder(folder, "transformer", config)
    _write_index(folder, ["transformer"])
    return nbytes


def write_ternary_pipeline(
    folder: Path, configs: Mapping[str, Any], *, activation_bits: int
) -> list[str]:
    """A whole pipeline with a ternary transformer; returns the paths of the ternary linears.

    The tokenizers are the shipped model's, told that prompts may be as long as FLUX.1's.

    Args:
      folder: to be made.
      configs: of all four components.
      activation_bits: of the ternary linears, 16 or 8.
    """
    for name, config in configs.items():
        if name != "transformer":
            write_component_folder(folder, name, config)
    lengths = {
        "tokenizer": configs["text_encoder"].max_position_embeddings,
        "tokenizer_2": DEV_TOKENS,
    }
    for name, length in lengths.items():
        shutil.copytree(shipped_path("tiny") / name, folder / name)
        file = folder / name / "tokenizer_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "model_max_length": length}))
    config, quant = configs["transformer"], QuantConfig(activation_bits=activation_bits)
    layers = ternary_layers(config)
    write_transformer(
        folder / "transformer", config, quant, layers, _ternary_tensors(config, quant, layers), {}
    )
    _write_index(folder, list(configs))
    return layers


def ternary_layers(config: FluxConfig) -> list[str]:
    """Paths of the linears that the default policy makes ternary."""
    from flux_jax.components import abstract_module

    return select(list(linears(abstract_module("transformer", config))), Policy())


def _ternary_tensors(
    config: FluxConfig, quant: QuantConfig, layers: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    shapes = dense_shapes(config)
    random = np.random.default_rng(1)
    pool = Pool(max(math.prod(shape) for shape in shapes.values()))
    rows: dict[int, np.ndarray] = {}
    for name, (shape, dtype) in expected_tensors(shapes, layers, quant).items():
        layer = name.rpartition(".")[0]
        if name.endswith(CODES):
            columns = shapes[f"{layer}.weight"][1]
            if columns not in rows:
                codes = random.integers(0, 3, (_ROWS, columns), np.uint8)
                rows[columns] = pack_base3(codes)
            # Each layer begins with another row.
            yield name, np.resize(np.roll(rows[columns], len(name), axis=0), shape)
        elif dtype == np.float16:
            # Two of three signs are not zero.
            columns = shapes[f"{layer}.weight"][1]
            yield name, np.full(shape, (columns * 2 / 3) ** -0.5, dtype)
        else:
            values = np.empty(shape, dtype)
            pool.fill(name, 0, values, moments(name, shape))
            yield name, values


def _write_index(folder: Path, components: list[str]) -> None:
    (folder / "scheduler").mkdir()
    schedule = scheduler.config_to_hf(SchedulerConfig.dev())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index: dict[str, Any] = {name: [None, None] for name in tables.CLASSES}
    for name in components:
        index[name] = list(tables.CLASSES[name])
        if name in _TOKENIZERS:
            index[_TOKENIZERS[name]] = ["transformers", "PreTrainedTokenizerFast"]
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    content = {"_class_name": "FluxPipeline", **index}
    (folder / "model_index.json").write_text(json.dumps(content))
