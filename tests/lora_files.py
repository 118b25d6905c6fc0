"""Small random LoRA files, made with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flux_jax.configs import FluxConfig
from flux_jax.lora import linear_shapes


def random_factors(
    shapes: Mapping[str, tuple[int, int]], *, rank: int = 3, strength: float = 0.1, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(R, K) and (N, R) for each."""
    rng = np.random.default_rng(seed)

    def factor(*shape: int) -> np.ndarray:
        return (strength * rng.standard_normal(shape)).astype(np.float32)

    return {name: (factor(rank, k), factor(n, rank)) for name, (n, k) in shapes.items()}


def bfl_name(layer: str) -> str:
    """Our path as Black Forest Labs have it."""
    for ours, theirs in (
        ("mlp.in_layer", "mlp.0"),
        ("mlp.out_layer", "mlp.2"),
        ("adaLN_modulation", "adaLN_modulation.1"),
    ):
        layer = layer.replace(ours, theirs)
    return layer


def write_lora(
    path: Path,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> Path:
    """In ComfyUI's names."""
    tensors = {}
    for layer, (a, b) in factors.items():
        tensors[f"diffusion_model.{bfl_name(layer)}.lora_A.weight"] = a
        tensors[f"diffusion_model.{bfl_name(layer)}.lora_B.weight"] = b
    save_file(tensors, path, metadata=metadata)
    return path


def small_lora(path: Path, config: FluxConfig, **options: float) -> Path:
    """Of every linear of a small transformer."""
    factors = random_factors(linear_shapes(config), **options)  # pyright: ignore[reportArgumentType]
    return write_lora(path, factors)
