"""The files of a training run: its log, pictures and weights."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from safetensors.numpy import load_file, save_file

from flux_jax.errors import UserError
from flux_jax.tree import Flat


class Log:
    """Lines to the terminal and rows to a CSV."""

    def __init__(self, path: Path):
        self.start = time.time()
        self.file = path.open("w", newline="")
        self.rows = csv.writer(self.file)
        self.rows.writerow(("phase", "step", "seconds", "loss", "detail"))

    def __call__(self, phase: str, step: int, loss: float, detail: str = "") -> None:
        seconds = time.time() - self.start
        self.rows.writerow((phase, step, f"{seconds:.1f}", f"{loss:.5f}", detail))
        self.file.flush()
        print(f"{seconds:8.1f} s  {phase:<12} {step:>6}  loss {loss:.5f}  {detail}", flush=True)


def save_grid(path: Path, pictures: UInt8[np.ndarray, "N H W 3"], columns: int = 8) -> None:
    """Pictures in a grid, as many as fill whole rows."""
    count = len(pictures) // columns * columns
    rows = pictures[:count].reshape(-1, columns, *pictures.shape[1:])
    grid = rows.transpose(0, 2, 1, 3, 4).reshape(rows.shape[0] * rows.shape[2], -1, 3)
    Image.fromarray(grid).save(path)


def save_parts(folder: Path, name: str, params: Flat, limit: int = 15 << 20) -> None:
    """Parameters in bf16, as safetensors of at most `limit` bytes: NAME.0.safetensors and so on."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for key, value in params.items():
        array = np.asarray(value.astype(jnp.bfloat16))
        if parts[-1] and sum(v.nbytes for v in parts[-1].values()) + array.nbytes > limit:
            parts.append({})
        parts[-1][key] = array
    for index, part in enumerate(parts):
        save_file(part, folder / f"{name}.{index}.safetensors")


def load_parts(folder: Path, name: str) -> dict[str, np.ndarray]:
    """What `save_parts` wrote.

    Raises:
      UserError: there is nothing of that name.
    """
    merged: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob(f"{name}.*.safetensors")):
        merged.update(load_file(path))
    if not merged:
        raise UserError(
            f"no {name}.*.safetensors in {folder}: a folder that `train` wrote has them"
        )
    return merged
