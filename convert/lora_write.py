"""Changes of our linears to a LoRA file, in the names of diffusers, PEFT and AI-Toolkit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from convert.maps.transformer import diffusers_map
from convert.safetensors_header import SUFFIX
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.files import write_whole, writing
from flux_jax.lora import LoRA, check_fits, linear_shapes


def write_lora(path: Path, lora: LoRA, config: FluxConfig, *, force: bool = False) -> None:
    """Write a LoRA to one safetensors file, which appears complete or not at all.

    Where a weight of ours has the rows of several of diffusers' (q, k and v), each of those has the
    same first factor, and its rows of the second.

    Args:
      path: the file.
      lora: its scale is multiplied into the second factors.
      config: of the transformer that it is for.
      force: replace a file that is there.

    Raises:
      UserError: another suffix, a file that is there or cannot be written, or a LoRA that does not
        fit the transformer.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a LoRA is written to a {SUFFIX} file, got another name")
    if path.exists() and not force:
        raise UserError(f"{path} exists: --force replaces it (in Python, force=True)")
    check_fits(lora, config)
    shapes, names = linear_shapes(config), diffusers_map(config)
    tensors: dict[str, np.ndarray] = {}
    for layer, change in lora.layers.items():
        b = change.b * np.float32(lora.scale)
        for piece in names.sources_of(f"{layer}.weight", shapes[layer]):
            part = np.empty((piece.source_shape[0], b.shape[1]), np.float32)
            for run in piece.runs:
                rows = slice(run.target_row, run.target_row + run.rows)
                part[run.source_row : run.source_row + run.rows] = b[rows]
            stem = f"transformer.{piece.source.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(change.a)
            tensors[f"{stem}.lora_B.weight"] = part
    with writing(path):
        write_whole(path, save(tensors, metadata={"format": "pt"}))
