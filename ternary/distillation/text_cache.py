"""Text embeddings, computed once and kept on disk beside the run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from flux_jax.errors import UserError
from flux_jax.prompts import PromptEmbeds
from ternary.storage import files
from ternary.storage.format import BFLOAT16, Stored
from ternary.storage.tensor_file import TensorFile

# Prompts of one tensor of the file: what is in host memory at a time while it is written.
CHUNK = 256


def cached_embeds(
    folder: Path,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], PromptEmbeds],
    *,
    key: str,
    shape: tuple[int, int, int],
) -> tuple[Shaped[np.ndarray, "P T C"], Shaped[np.ndarray, "P V"]]:
    """The embeddings of prompts, from the cache if they are there.

    Args:
      folder: where the cache lies.
      prompts: P texts.
      encode: called with some of them at a time, if they are not there yet.
      key: whatever else the embeddings depend on: the model, the length.
      shape: (T, C, V): tokens, width of T5, width of CLIP.

    Returns:
      (T5's, CLIP's pooled), in host memory, bfloat16.

    Raises:
      UserError: the cache cannot be written, or is damaged.
    """
    name = hashlib.sha256("\n".join((key, *prompts)).encode()).hexdigest()[:16]
    path = folder / f"embeddings-{name}.safetensors"
    starts = range(0, len(prompts), CHUNK)
    if not path.exists():
        _write(path, prompts, encode, starts, shape)
    stored = files.StoredTensors(path)
    try:
        parts = [(stored.read(f"txt.{start}"), stored.read(f"pooled.{start}")) for start in starts]
    finally:
        stored.close()
    txt, pooled = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return txt.view(BFLOAT16), pooled.view(BFLOAT16)


def _write(
    path: Path,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], PromptEmbeds],
    starts: range,
    shape: tuple[int, int, int],
) -> None:
    tokens, width, pooled = shape
    tensors: dict[str, Stored] = {}
    for start in starts:
        count = min(CHUNK, len(prompts) - start)
        tensors[f"txt.{start}"] = Stored((count, tokens, width), BFLOAT16)
        tensors[f"pooled.{start}"] = Stored((count, pooled), BFLOAT16)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with TensorFile(unfinished, tensors) as file:
            for start in starts:
                embeds = encode(prompts[start : start + CHUNK])
                file.write(f"txt.{start}", _host(embeds.prompt_embeds))
                file.write(f"pooled.{start}", _host(embeds.pooled_prompt_embeds))
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(
            f"cannot write the text embeddings {path}: {error.strerror or error}"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _host(array: Any) -> np.ndarray:
    return np.asarray(array).astype(BFLOAT16, copy=False)
