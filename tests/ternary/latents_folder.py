"""A folder of latent weights, as a calibration leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternary.config import QuantConfig
from ternary.policy import Policy
from ternary.storage.latents import write_index, write_part


def write_latents(
    folder: Path, parts: Mapping[str, Mapping[str, Any]], quant: QuantConfig, policy: Policy
) -> Path:
    """Parameters by part and full name."""
    folder.mkdir(parents=True)
    checksums = {
        part: write_part(folder / f"{part}.safetensors", tensors) for part, tensors in parts.items()
    }
    write_index(folder, checksums, quant, policy)
    return folder
