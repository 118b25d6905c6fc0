"""Writing safetensors checkpoints, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from convert.files import finish, write_all
from convert.safetensors_header import DTYPES, INDEX_SUFFIX
from convert.tensors import OnBlock, Reader, Spec, as_bytes, blocks, total_bytes

# Written pages go to the disk, and out of memory, this often. A conversion passes every byte once;
# with gigabytes of pages in the cache that nobody will want again it took up to four times as long.
SYNC_BYTES = 32 << 20
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def make_header(
    specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors, and where in the file each tensor begins, in its order.

    Args:
      specs: of the tensors. Wider dtypes go first, so that each is aligned to its item size.
      metadata: strings for `__metadata__`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    position = 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec, starts[name] = specs[name], position
        entries[name] = {
            "dtype": _KINDS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def write_file(
    path: Path,
    reader: Reader,
    names: Iterable[str],
    metadata: Mapping[str, str],
    on_block: OnBlock = lambda name, block: None,
) -> None:
    """Write one safetensors file, block by block.

    Args:
      path: to be created.
      reader: of the tensors.
      names: which of its tensors; among those of one width, in their order.
      metadata: strings for `__metadata__`.
      on_block: called with the tensor name and each block after it is written, in row order.

    Raises:
      UserError: a tensor cannot be read.
      OSError: the file cannot be written.
    """
    header, starts = make_header({name: reader.specs[name] for name in names}, metadata)
    written = 0
    with open(path, "xb", buffering=0) as file:
        write_all(file.fileno(), header)
        for name in starts:
            for block in blocks(reader, name):
                written += write_all(file.fileno(), as_bytes(block))
                on_block(name, block)
                if written > SYNC_BYTES:
                    finish(file.fileno())
                    written = 0
        finish(file.fileno())


def write_component(
    folder: Path,
    stem: str,
    reader: Reader,
    *,
    shard_bytes: int,
    on_block: OnBlock = lambda name, block: None,
) -> None:
    """Write a component as one file, or as shards with an index, under Hugging Face's names.

    Args:
      folder: to be filled.
      stem: "diffusion_pytorch_model" or "model".
      reader: of the tensors.
      shard_bytes: upper bound of a shard, unless one tensor is larger.
      on_block: see `write_file`.

    Raises:
      UserError: a tensor cannot be read.
      OSError: a file cannot be written.
    """
    shards = list(_shards(reader, shard_bytes))
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", reader, shards[0], {"format": "pt"}, on_block)
        return
    places = {}
    for i, names in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, reader, names, {"format": "pt"}, on_block)
        places |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": total_bytes(reader)},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")


def _shards(reader: Reader, shard_bytes: int) -> Iterator[list[str]]:
    """The tensors' names in order, cut where a shard would become too large."""
    names: list[str] = []
    filled = 0
    for name, spec in reader.specs.items():
        if names and filled + spec.nbytes > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += spec.nbytes
    yield names
