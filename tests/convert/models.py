"""Small random checkpoints in every layout, made with numpy alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import tables
from convert.maps import scheduler
from convert.plan import Assembly, backward_plan
from convert.safetensors_read import SafetensorsReader
from convert.safetensors_write import write_component, write_file
from convert.tensors import Assembled, Spec, read_whole
from convert.transforms import row_count
from flux_jax.configs import (
    AutoencoderConfig,
    CLIPTextConfig,
    FluxConfig,
    SchedulerConfig,
    T5Config,
)

CONFIGS: dict[str, Any] = {
    "transformer": FluxConfig(
        in_channels=8,
        vec_in_dim=16,
        context_in_dim=24,
        hidden_size=128,
        num_heads=1,
        depth=2,
        depth_single_blocks=3,
    ),
    "text_encoder": CLIPTextConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=7,
    ),
    "text_encoder_2": T5Config(
        vocab_size=40, d_model=24, d_kv=8, d_ff=20, num_layers=2, num_heads=2
    ),
    "vae": AutoencoderConfig(
        latent_channels=2, block_out_channels=(32, 64), layers_per_block=1, sample_size=32
    ),
}


class Arrays:
    """A reader of arrays in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)
        self.specs = {name: Spec(a.shape, a.dtype) for name, a in self.arrays.items()}

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        spec = self.specs[name]
        out[...] = self.arrays[name].reshape(spec.rows, *spec.row_shape)[row : row + len(out)]


def random_parameters(
    component: str, dtype: Any = ml_dtypes.bfloat16, *, config: Any = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """A component's parameters under our names."""
    rng = np.random.default_rng(seed)
    shapes = tables.our_shapes(component, config or CONFIGS[component])
    return {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}


def stored_tensors(
    component: str, parameters: Mapping[str, np.ndarray], layout: str, *, config: Any = None
) -> dict[str, np.ndarray]:
    """The same parameters under the names of another layout, "diffusers" or "bfl"."""
    config = config or CONFIGS[component]
    make = tables.diffusers_map if layout == "diffusers" else tables.single_file_map
    plan = backward_plan(make(component, config), {n: a.shape for n, a in parameters.items()})
    reader = Assembled(Arrays(parameters), plan.assemblies, None, what="test")
    return {name: read_whole(reader, name) for name in reader.specs}


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file."""
    write_file(path, Arrays(tensors), tensors, metadata or {})
    return path


def read_tensors(*paths: Path) -> dict[str, np.ndarray]:
    """All tensors of safetensors files."""
    found: dict[str, np.ndarray] = {}
    for path in paths:
        reader = SafetensorsReader.open_file(path)
        found |= {name: read_whole(reader, name) for name in reader.specs}
        reader.close()
    return found


def diffusers_folder(
    folder: Path,
    components: Any = tables.COMPONENTS,
    *,
    dtype: Any = ml_dtypes.bfloat16,
    shard_bytes: int = 10**9,
    configs: Mapping[str, Any] = CONFIGS,
) -> dict[str, dict[str, np.ndarray]]:
    """Write a diffusers pipeline of random weights; returns our parameters by component."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"}
    made = {}
    for name in tables.COMPONENTS:
        index[name] = list(tables.CLASSES[name]) if name in components else [None, None]
        if name not in components:
            continue
        made[name] = random_parameters(name, dtype, config=configs[name])
        tensors = stored_tensors(name, made[name], "diffusers", config=configs[name])
        (folder / name).mkdir()
        write_component(folder / name, tables.STEMS[name], Arrays(tensors), shard_bytes=shard_bytes)
        config = tables.config_to_hf(name, configs[name])
        (folder / name / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
        index[name] = ["transformers", "T5Tokenizer"]
    (folder / "scheduler").mkdir()
    config = scheduler.config_to_hf(dataclasses.replace(SchedulerConfig.dev(), max_shift=1.25))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return made


def safetensors_in(folder: Path) -> list[Path]:
    """All safetensors files below a folder."""
    return sorted(folder.rglob("*.safetensors"))


def check_cover(assemblies: Iterable[Assembly]) -> None:
    """Assert that the runs of each assembly fill each of its rows exactly once.

    Raises:
        ValueError: a gap or an overlap: a mistake in a transform.
    """
    for assembly in assemblies:
        spans = sorted(
            (run.target_row, run.target_row + run.rows)
            for piece in assembly.pieces
            for run in piece.runs
        )
        position = 0
        for start, stop in spans:
            if start != position:
                raise ValueError(f"{assembly.name}: rows {position}..{start} gap or overlap")
            position = stop
        if position != row_count(assembly.shape):
            raise ValueError(
                f"{assembly.name}: {position} of {row_count(assembly.shape)} rows are filled"
            )
