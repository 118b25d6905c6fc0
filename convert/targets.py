"""What a conversion writes: a Flax checkpoint, a diffusers folder, or single files.

Each writer fills a path that does not exist yet (or, for folders, is empty); atomicity is the
caller's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import tables
from convert.flax_config import write_config
from convert.maps import scheduler
from convert.plan import backward_plan
from convert.rules import Map
from convert.safetensors_write import write_component, write_file
from convert.single_file import CONFIG_KEY
from convert.source import Parameters, Source
from convert.tensors import Assembled
from flux_jax.errors import UserError

# Told the component, the name of a stored tensor and each of its blocks, in row order.
OnComponentBlock = Callable[[str, str, np.ndarray], None]

_TOKENIZER_CLASSES = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
_NONE = [None, None]  # a component that is not there, in model_index.json
_SINGLE_FILES = {
    "transformer": "flux1.safetensors",
    "vae": "ae.safetensors",
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "t5xxl.safetensors",
}


def write_flax(
    stage: Path, source: Source, parts: Mapping[str, Parameters], on_block: OnComponentBlock
) -> None:
    """Fill a folder with a Flax checkpoint of ours (docs/convert.md has its layout).

    Raises:
      UserError: a tensor cannot be read.
      OSError, ValueError: writing failed.
    """
    from convert.orbax_write import write_checkpoint

    # First: what is small shows soonest whether it is whole.
    copy_tokenizers(source.tokenizers, stage)
    for name, part in parts.items():
        write_checkpoint(
            stage / name,
            part.reader,
            lambda tensor, block, name=name: on_block(name, tensor, block),
        )
    configs = {name: part.config for name, part in parts.items()}
    write_config(stage, configs, source.scheduler)


def copy_tokenizers(tokenizers: Mapping[str, Path], folder: Path) -> None:
    """Copy the files of tokenizers; the hub's cache has symbolic links, which become files.

    Raises:
      UserError: a file cannot be copied, or is a link that leads elsewhere.
    """
    for name, source in tokenizers.items():
        # A checkpoint of a stranger's could have private files of this machine copied.
        here = source.parent.resolve() / source.name
        allowed = [here]
        if here.parent.parent.name == "snapshots":
            allowed.append(here.parent.parent.parent / "blobs")
        (folder / name).mkdir()
        try:
            # Not by `glob`, which finds nothing in a folder that may not be read.
            files = sorted(source.iterdir())
        except OSError as error:
            raise UserError(f"{source}: cannot be copied: {error.strerror or error}") from error
        for file in files:
            if not any(map(file.match, tables.TOKENIZER_FILES)):
                continue
            real = file.resolve()
            if real.exists() and not any(real.is_relative_to(place) for place in allowed):
                raise UserError(f"{file}: a link leads out of its folder, which is not followed")
            if file.is_dir():
                continue
            try:
                shutil.copyfile(file, folder / name / file.name)
            except OSError as error:
                raise UserError(f"{file}: cannot be copied: {error.strerror or error}") from error


def _exported(part: Parameters, table: Map, what: str) -> Assembled:
    """Our parameters under the names of a map."""
    shapes = {name: spec.shape for name, spec in part.reader.specs.items()}
    return Assembled(part.reader, backward_plan(table, shapes).assemblies, None, what=what)


def write_diffusers(
    stage: Path,
    source: Source,
    parts: Mapping[str, Parameters],
    shard_bytes: int,
    on_block: OnComponentBlock,
) -> None:
    """Fill a folder with a diffusers pipeline, or with those parts of it that there are.

    Raises:
      UserError: diffusers has no such model.
      OSError: writing failed.
    """
    copy_tokenizers(source.tokenizers, stage)
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    for name, class_ in tables.CLASSES.items():
        index[name] = list(class_) if name in parts else _NONE
    for name, part in parts.items():
        folder = stage / name
        folder.mkdir()
        config = tables.config_to_hf(name, part.config)
        dtypes = {spec.dtype.name for spec in part.reader.specs.values()}
        if tables.CLASSES[name][0] == "transformers" and len(dtypes) == 1:
            config["dtype"] = dtypes.pop()
        _write_json(folder / "config.json", config)
        table = tables.diffusers_map(name, part.config)
        write_component(
            folder,
            tables.STEMS[name],
            _exported(part, table, name),
            shard_bytes=shard_bytes,
            on_block=lambda tensor, block, name=name: on_block(name, tensor, block),
        )
    for name, usual in _TOKENIZER_CLASSES.items():
        present = name in source.tokenizers
        index[name] = ["transformers", usual] if present else _NONE
    if source.scheduler is not None:
        (stage / "scheduler").mkdir()
        config = scheduler.config_to_hf(source.scheduler)
        _write_json(stage / "scheduler" / "scheduler_config.json", config)
    index["scheduler"] = (
        ["diffusers", "FlowMatchEulerDiscreteScheduler"] if source.scheduler else _NONE
    )
    _write_json(stage / "model_index.json", index)


def write_bfl(stage: Path, parts: Mapping[str, Parameters], on_block: OnComponentBlock) -> None:
    """Write single files under Black Forest Labs' names.

    A path that ends in `.safetensors` becomes one file with one component; any other a folder with
    a file for each.

    Raises:
      UserError: one file is asked for and there are several components.
      OSError: writing failed.
    """
    single = stage.suffix == ".safetensors"
    if single and len(parts) != 1:
        raise UserError(
            f"{stage.name}: one file holds one component, there are {', '.join(parts)}; choose one "
            "with --components, or give a folder"
        )
    if not single:
        stage.mkdir()
    for name, part in parts.items():
        reader = _exported(part, tables.single_file_map(name, part.config), name)
        config = {name: tables.config_to_json(part.config)}
        write_file(
            stage if single else stage / _SINGLE_FILES[name],
            reader,
            reader.specs,
            {"format": "pt", CONFIG_KEY: json.dumps(config, separators=(",", ":"))},
            lambda tensor, block, name=name: on_block(name, tensor, block),
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
