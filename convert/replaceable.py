"""What `--force` may replace: checkpoints as a conversion makes them, with nothing else in them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from convert import atomic, quantized, single_file, tables
from convert.files import read_json
from convert.flax_config import FORMAT
from convert.orbax_read import array_names
from convert.safetensors_header import SUFFIX, read_header
from convert.safetensors_read import SafetensorsReader
from convert.single_file import CONFIG_KEY
from convert.source import PIPELINES
from flux_jax.components import TOKENIZERS
from flux_jax.errors import UserError

_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"),
}
_ORBAX_FILES = {"_METADATA", "_CHECKPOINT_METADATA", "_sharding", "commit_success.txt"}
# Of an array of an Orbax checkpoint: its description, and its chunks by index.
_ZARR_FILE = re.compile(r"\.zarray|\.zattrs|\d+(\.\d+)*")


def check_target(target: Path, *, force: bool) -> None:
    """Whether a checkpoint may be written to `target`: said before long work.

    Raises:
      UserError: something is there, and not to be replaced.
    """
    atomic.check_target(target, force=force, replaceable=is_checkpoint)


def check_apart(source: Path, target: Path) -> None:
    """Refuses to replace a checkpoint by what is made of it.

    Raises:
      UserError: the target is the source, has it in it, or is there and in the source.
    """
    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise UserError(
            f"{target}: the target would replace the source {source}; choose another place"
        )
    if here in there.parents and there.exists():
        raise UserError(
            f"{target}: the target would replace what is in the source {source}; choose another "
            "place"
        )


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder that becomes the checkpoint `target` at the end of the block, whole or not at all.

    Raises:
      UserError: see `atomic.staged`.
    """
    with atomic.staged(target, force=force, replaceable=is_checkpoint) as stage:
        stage.mkdir()
        yield stage


def is_checkpoint(path: Path) -> bool:
    """Whether a path holds what a conversion makes, and so may replace.

    That is a file of FLUX.1's weights; a pipeline of FLUX.1 or a Flax checkpoint of ours, with
    nothing else in the folder or in those inside it but latent weights of ours; or a folder of
    single files that all carry our note: anybody may keep others in one folder.
    """
    try:
        if not path.is_dir():
            return path.suffix == SUFFIX and path.is_file() and _is_single_file(path)
        if (path / "model_index.json").is_file():
            is_ours = read_json(path / "model_index.json").get("_class_name") in PIPELINES
            return is_ours and all(map(_belongs, path.iterdir()))
        if (path / "config.json").is_file():
            is_ours = read_json(path / "config.json").get("format") == FORMAT
            return is_ours and all(map(_belongs, path.iterdir()))
        return all(
            entry.suffix == SUFFIX and CONFIG_KEY in read_header(entry).metadata
            for entry in path.iterdir()
        )
    except UserError:
        return False


def _belongs(entry: Path) -> bool:
    """Whether something in a pipeline's folder, of whichever layout, is a part of the pipeline.

    Raises:
      UserError: what describes it cannot be read.
    """
    name = entry.name
    if name in ("model_index.json", "config.json"):
        return entry.is_file()
    if not entry.is_dir():
        return False
    if name == tables.LATENTS:
        return quantized.are_latents(entry)
    if name == "scheduler":
        return _holds_only(entry, {"scheduler_config.json"})
    if name in TOKENIZERS:
        return _holds_only(entry, _TOKENIZER_FILES)
    if name in tables.COMPONENTS:
        return _is_orbax(entry) if (entry / "_METADATA").is_file() else _are_weights(entry)
    return False


def _holds_only(folder: Path, names: set[str]) -> bool:
    return all(entry.name in names and entry.is_file() for entry in folder.iterdir())


def _are_weights(folder: Path) -> bool:
    """Whether a component's folder holds its config and weights under their usual names alone."""
    stem = tables.STEMS[folder.name]
    weights = re.compile(rf"{stem}((-\d{{5}}-of-\d{{5}})?{SUFFIX}|{SUFFIX}\.index\.json)")
    names = {entry.name for entry in folder.iterdir()}
    return _holds_only(
        folder, {"config.json", tables.TERNARY_FILE, *filter(weights.fullmatch, names)}
    )


def _is_orbax(folder: Path) -> bool:
    """Whether a component's folder holds the arrays that its metadata lists, and no more.

    Raises:
      UserError: the metadata cannot be read.
    """
    arrays = set(array_names(folder))
    for entry in folder.iterdir():
        if entry.name in _ORBAX_FILES and entry.is_file():
            continue
        if entry.name not in arrays or not entry.is_dir():
            return False
        if not all(_ZARR_FILE.fullmatch(file.name) and file.is_file() for file in entry.iterdir()):
            return False
    return True


def _is_single_file(path: Path) -> bool:
    """Whether it is one that is read: ours, or with tensors that are known.

    Raises:
      UserError: it is none.
    """
    reader = SafetensorsReader.open_file(path)
    try:
        return bool(single_file.split(reader, what=str(path)))
    finally:
        reader.close()
