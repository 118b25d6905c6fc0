"""Reading safetensors checkpoints, in one file or in shards with an index.

Files are read with `pread` into the caller's buffers, never mapped: the memory that a conversion
shows is the memory that it uses.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.files import forget, read_json
from convert.problems import MAX_SHOWN, refusal
from convert.safetensors_header import INDEX_SUFFIX, SUFFIX, StoredTensor, read_header
from convert.tensors import Spec, as_bytes
from flux_jax.errors import UserError

# Suffixes of files that are never opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


_VARIANT_INDEX = re.compile(rf".+{re.escape(SUFFIX)}\.index\.[^.]+\.json")


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
            raise refusal(index, problems)
        return cls(tensors, metadata)

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        tensor = self._tensors[name]
        offset = tensor.start + row * self.specs[name].row_bytes
        target = as_bytes(out)
        done = 0
        try:
            fd = self._descriptor(tensor.path)
            while done < len(target):
                count = os.preadv(fd, [target[done:]], offset + done)
                if count == 0:
                    raise UserError(
                        f"{tensor.path}: tensor `{name}` ends early; has the file changed?"
                    )
                done += count
        except OSError as error:
            raise UserError(
                f"{tensor.path}: tensor `{name}` cannot be read: {error.strerror}"
            ) from error
        if self.read_once:
            forget(fd, offset, len(target))

    def _descriptor(self, path: Path) -> int:
        with self._opening:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, each checked to be a plain name of a file that is there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no `weight_map` from tensors to shards")
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(SUFFIX):
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
        shown = ", ".join(missing[:MAX_SHOWN])
        raise UserError(
            f"{index}: {len(missing)} of {len(set(places.values()))} shards missing: {shown}; "
            "download the folder again"
        )
    return places


def open_component(folder: Path) -> SafetensorsReader:
    """Open the weights of a component folder (`transformer/`, `vae/`, ...).

    An index goes before a single file, and a file without variant (`.fp16`) before one with.
    diffusers and transformers name a variant's index `.safetensors.index.fp16.json`.

    Raises:
      UserError: no safetensors weights, or several with equal right.
    """
    paths = sorted(folder.iterdir())
    indices = [path for path in paths if path.name.endswith(INDEX_SUFFIX)]
    files = [path for path in paths if path.name.endswith(SUFFIX)]
    for candidates, opened in (
        (_plain(indices, INDEX_SUFFIX), SafetensorsReader.open_index),
        (indices, SafetensorsReader.open_index),
        (_plain(files, SUFFIX), SafetensorsReader.open_file),
        ([p for p in paths if _VARIANT_INDEX.fullmatch(p.name)], SafetensorsReader.open_index),
        (files, SafetensorsReader.open_file),
    ):
        if len(candidates) == 1:
            return opened(candidates[0])
        if candidates:
            names = ", ".join(path.name for path in candidates[:MAX_SHOWN])
            raise UserError(
                f"{folder}: cannot tell which of these is the component: {names}; keep one, or "
                "download the index that joins them"
            )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise refuse_pickle(folder / pickles[0])
    raise UserError(f"{folder}: no .safetensors weights found")


def _plain(paths: Sequence[Path], suffix: str) -> list[Path]:
    """Those without a variant."""
    return [path for path in paths if "." not in path.name.removesuffix(suffix)]


def refuse_pickle(path: Path) -> UserError:
    """The error for a file with one of the suffixes `PICKLES`."""
    return UserError(
        f"{path}: refused: a pickle can run any code when it is opened; use the .safetensors "
        "file of the same model, or save one with safetensors.torch.save_file where you trust it"
    )
