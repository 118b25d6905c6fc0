"""Text embeddings, computed once, kept on disk beside the run and read row by row.

    embeddings-3f2c.../000000.safetensors     prompts 0 to 255: txt (256, T, C), pooled (256, V)
    embeddings-3f2c.../000256.safetensors     ...

Several processes share the folder: each encodes files of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from convert.safetensors_read import SafetensorsReader
from convert.tensors import BFLOAT16, Spec
from flux_jax.errors import UserError
from flux_jax.files import writing
from flux_jax.processes import Processes
from flux_jax.prompt_embeds import PromptEmbeds
from ternary.storage.tensor_file import TensorFile

# Prompts of one file: what is in host memory at a time while it is written.
CHUNK = 256

Shape = tuple[int, int, int]


class TextTable:
    """The embeddings of prompts, on disk; rows are read when they are asked for.

    Attributes:
      shape: (T, C, V): tokens, width of T5, width of CLIP.
    """

    def __init__(self, folder: Path, count: int, shape: Shape):
        """Open the files of `count` prompts.

        Raises:
          UserError: a file that is missing or damaged, or holds other shapes.
        """
        self.shape = shape
        self._files: dict[int, SafetensorsReader] = {}
        for start in range(0, count, CHUNK):
            path = _path(folder, start)
            found = self._files[start] = SafetensorsReader.open_file(path)
            wanted = _tensors(min(CHUNK, count - start), shape)
            if found.specs != wanted:
                raise UserError(f"{path}: holds {found.specs}, expected {wanted}; delete {folder}")

    def take(
        self, rows: Int[np.ndarray, "*B"]
    ) -> tuple[Shaped[np.ndarray, "*B T C"], Shaped[np.ndarray, "*B V"]]:
        """The embeddings of some prompts, bfloat16: (T5's, CLIP's pooled).

        Raises:
          UserError: they cannot be read.
        """
        tokens, width, pooled_width = self.shape
        flat = np.asarray(rows).reshape(-1)
        txt = np.empty((flat.size, tokens, width), BFLOAT16)
        pooled = np.empty((flat.size, pooled_width), BFLOAT16)
        for place, row in enumerate(flat.tolist()):
            file = self._files[row - row % CHUNK]
            file.read_into("txt", row % CHUNK, txt[place : place + 1])
            file.read_into("pooled", row % CHUNK, pooled[place : place + 1])
        return txt.reshape(*rows.shape, tokens, width), pooled.reshape(*rows.shape, pooled_width)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def cached_embeds(
    folder: Path,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], PromptEmbeds],
    *,
    key: str,
    shape: Shape,
    processes: Processes | None = None,
) -> TextTable:
    """The embeddings of prompts, from the cache as far as they are there.

    Args:
      folder: where the cache lies.
      prompts: P texts.
      encode: called with some of them at a time, if they are not there yet.
      key: whatever else the embeddings depend on: the model, the length.
      shape: see `TextTable`.
      processes: that share the folder, each of which calls this; None for this one alone.

    Raises:
      UserError: the cache cannot be written, or is damaged.
    """
    name = hashlib.sha256("\n".join((key, *prompts)).encode()).hexdigest()[:16]
    cache = folder / f"embeddings-{name}"
    processes = Processes() if processes is None else processes
    starts = range(0, len(prompts), CHUNK)
    for start in starts[processes.index :: processes.count]:
        if not _path(cache, start).exists():
            _write(_path(cache, start), prompts[start : start + CHUNK], encode, shape)
    processes.wait("text embeddings")
    return TextTable(cache, len(prompts), shape)


def _path(folder: Path, start: int) -> Path:
    return folder / f"{start:06d}.safetensors"


def _tensors(count: int, shape: Shape) -> dict[str, Spec]:
    tokens, width, pooled = shape
    return {
        "txt": Spec((count, tokens, width), BFLOAT16),
        "pooled": Spec((count, pooled), BFLOAT16),
    }


def _write(
    path: Path,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], PromptEmbeds],
    shape: Shape,
) -> None:
    # One name for all times: what a killed process left is written over by the next.
    unfinished = path.with_suffix(".partial")
    try:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            unfinished.unlink(missing_ok=True)
            with TensorFile(unfinished, _tensors(len(prompts), shape)) as file:
                embeds = encode(prompts)
                file.write("txt", _host(embeds.prompt_embeds))
                file.write("pooled", _host(embeds.pooled_prompt_embeds))
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _host(array: Any) -> np.ndarray:
    return np.asarray(array).astype(BFLOAT16, copy=False)
