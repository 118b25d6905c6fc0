"""Reading and writing safetensors checkpoints, in one file or in shards with an index.

Files are read with `pread` into the caller's buffers, never mapped: the memory that a conversion
shows is the memory that it uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from convert.rules import MAX_PROBLEMS_SHOWN
from convert.safetensors_header import DTYPES, StoredTensor, read_header
from convert.tensors import Reader, Spec, as_bytes, blocks
from flux_jax.errors import UserError

INDEX_SUFFIX = ".safetensors.index.json"
MAX_JSON_BYTES = 50_000_000
# Written pages go to the disk, and out of memory, this often. A conversion passes every byte once;
# with gigabytes of pages in the cache that nobody will want again it took up to four times as long.
SYNC_BYTES = 32 << 20
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class SafetensorsReader:
    """Reader of the tensors of safetensors files; keeps the files open until `close`.

    Attributes:
      specs: shapes and dtypes by stored name.
      metadata: the files' `__metadata__`, merged.
      read_once: drop pages from the system's page cache once they are read.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]):
        self.read_once = False
        self._tensors = dict(tensors)
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()  # several threads may read
        self.metadata = dict(metadata)
        self.specs = {name: Spec(t.shape, t.dtype) for name, t in self._tensors.items()}

    @classmethod
    def open_file(cls, path: Path) -> SafetensorsReader:
        """Open one file.

        Raises:
          UserError: see `read_header`.
        """
        return cls(*read_header(path))

    @classmethod
    def open_index(cls, index: Path) -> SafetensorsReader:
        """Open the shards that an index names.

        Raises:
          UserError: a shard is missing or outside the folder, a tensor is not where the index says
            or not in the index, or a shard is broken.
        """
        places = _read_index(index)
        tensors: dict[str, StoredTensor] = {}
        metadata: dict[str, str] = {}
        actual: dict[str, str] = {}
        for shard in sorted(set(places.values())):
            header = read_header(index.parent / shard)
            metadata |= header.metadata
            for name, tensor in header.tensors.items():
                if name in actual:
                    raise UserError(
                        f"{index}: tensor `{name}` is both in {actual[name]} and in {shard}"
                    )
                actual[name] = shard
                tensors[name] = tensor
        problems = [
            f"tensor `{name}` should be in {shard}, "
            + (f"found in {actual[name]}" if name in actual else "found in no shard")
            for name, shard in places.items()
            if actual.get(name) != shard
        ] + [
            f"tensor `{name}` of {shard} is not in the index"
            for name, shard in actual.items()
            if name not in places
        ]
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{index}: {'; '.join(problems[:3])}{more}")
        return cls(tensors, metadata)

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        tensor = self._tensors[name]
        with self._opening:
            if tensor.path not in self._files:
                self._files[tensor.path] = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        offset = tensor.start + row * self.specs[name].row_bytes
        target = as_bytes(out)
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._files[tensor.path], [target[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{tensor.path}: tensor `{name}`: {error.strerror}") from error
            if count == 0:
                raise UserError(f"{tensor.path}: tensor `{name}` ends early; has the file changed?")
            done += count
        if self.read_once:
            forget(self._files[tensor.path], offset, len(target))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
      UserError: the file is absent, too large or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES} bytes, this is no config file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, each checked to be a plain name of a file that is there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no `weight_map` from tensors to shards")
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise UserError(
                f"{index}: tensor {ascii(name)[:80]} is in {ascii(shard)[:80]}, "
                "expected a .safetensors file"
            )
        # A shard stands beside its index; a symbolic link there (as in the hub's cache) is fine.
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise UserError(
                f"{index}: shard {ascii(shard)[:80]} lies outside the folder, refused; an index "
                "may only name files beside it"
            )
    missing = sorted({s for s in places.values() if not (index.parent / s).is_file()})
    if missing:
        shown = ", ".join(missing[:MAX_PROBLEMS_SHOWN])
        raise UserError(
            f"{index}: {len(missing)} of {len(set(places.values()))} shards missing: {shown}; "
            "download the folder again"
        )
    return places


def open_component(folder: Path) -> SafetensorsReader:
    """Open the weights of a component folder (`transformer/`, `vae/`, ...).

    An index goes before a single file, and a file without variant (`.fp16`) before one with.

    Raises:
      UserError: no safetensors weights, or several with equal right.
    """
    files = sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors"))
    indices = sorted(path for path in folder.iterdir() if path.name.endswith(INDEX_SUFFIX))
    for found, opened in ((indices, "open_index"), (files, "open_file")):
        stem_is_plain = [p for p in found if p.name.removesuffix(INDEX_SUFFIX).count(".") == 0]
        plain = [p for p in found if p.name.removesuffix(".safetensors").count(".") == 0]
        candidates = (stem_is_plain if found is indices else plain) or found
        if len(candidates) == 1:
            return getattr(SafetensorsReader, opened)(candidates[0])
        if candidates:
            names = ", ".join(p.name for p in candidates[:MAX_PROBLEMS_SHOWN])
            raise UserError(
                f"{folder}: cannot tell which of these is the component: {names}; keep one, or "
                "download the index that joins them"
            )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise refuse_pickle(folder / pickles[0])
    raise UserError(f"{folder}: no .safetensors weights found")


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_pickle(path: Path) -> UserError:
    return UserError(
        f"{path}: refused: a pickle can run any code when it is opened; use the .safetensors "
        "file of the same model, or save one with safetensors.torch.save_file where you trust it"
    )


def write_file(
    path: Path,
    reader: Reader,
    names: Iterable[str],
    metadata: Mapping[str, str],
    on_block: Callable[[str, np.ndarray], None] = lambda name, block: None,
) -> None:
    """Write one safetensors file, block by block.

    Args:
      path: to be created.
      reader: of the tensors.
      names: which of its tensors, in the order of the file (tensors of wider dtypes go first, so
        that each is aligned to its item size).
      metadata: strings for `__metadata__`.
      on_block: called with the tensor name and each block after it is written, in row order.

    Raises:
      OSError: the file cannot be written.
    """
    ordered = sorted(names, key=lambda name: -reader.specs[name].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in ordered:
        spec = reader.specs[name]
        entries[name] = {
            "dtype": _KINDS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    written = 0
    with open(path, "xb", buffering=0) as file:
        write_all(file.fileno(), len(header).to_bytes(8, "little") + header)
        for name in ordered:
            for block in blocks(reader, name):
                written += write_all(file.fileno(), as_bytes(block))
                on_block(name, block)
                if written > SYNC_BYTES:
                    finish(file.fileno())
                    written = 0
        finish(file.fileno())


def finish(fd: int) -> None:
    """Wait until what was written to a file is on the disk, then drop its pages."""
    os.fsync(fd)
    forget(fd)


def forget(fd: int, offset: int = 0, length: int = 0) -> None:
    """Drop a range of a file (or all of it) from the system's page cache, where that can be."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def write_all(fd: int, data: bytes | memoryview) -> int:
    """Write all of `data`; returns its length."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def write_component(
    folder: Path,
    stem: str,
    reader: Reader,
    *,
    shard_bytes: int,
    on_block: Callable[[str, np.ndarray], None] = lambda name, block: None,
) -> None:
    """Write a component as one file, or as shards with an index, under Hugging Face's names.

    Args:
      folder: to be filled.
      stem: "diffusion_pytorch_model" or "model".
      reader: of the tensors.
      shard_bytes: upper bound of a shard, unless one tensor is larger.
      on_block: see `write_file`.

    Raises:
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
    total = sum(spec.nbytes for spec in reader.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")


def _shards(reader: Reader, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, spec in reader.specs.items():
        if names and filled + spec.nbytes > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += spec.nbytes
    yield names


@contextlib.contextmanager
def closing(readers: Iterable[SafetensorsReader]) -> Iterator[None]:
    """Close the files of all readers at the end of the block."""
    readers = list(readers)
    try:
        yield
    finally:
        for reader in readers:
            reader.close()
