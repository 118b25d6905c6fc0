"""What the parity tests share: a saved torch model is loaded as users load theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flux_jax.checkpoint import load_checkpoint
from flux_jax.functional import ModuleFunction

# The targets of the project: relative error of the output's norm.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def relative_error(ours: Any, theirs: Any) -> float:
    """Norm of the difference over the norm of `theirs`, in float64."""
    a, b = as_float64(ours), as_float64(theirs)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def as_float64(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        return x.detach().double().numpy()
    return np.asarray(x).astype(np.float64)


def perturb_vectors(model: torch.nn.Module, seed: int) -> None:
    """Move norm scales and biases off their initial ones and zeros, which would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def round_to_bfloat16(model: torch.nn.Module) -> None:
    """Round the weights, so that both sides hold the same numbers whatever they compute in."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def load(folder: Path, component: str, dtype: str) -> Any:
    """Our module with the weights of a component's folder, through the production loader."""
    return load_checkpoint(folder, dtype=jnp.dtype(dtype)).modules[component]


def ours(model: Any, component: str, dtype: str, folder: Path, **saving: Any) -> Any:
    """Our module with a torch model's weights, saved as its library does.

    The model's own weights are rounded to `dtype` first, but it stays a float32 model.
    """
    if dtype == "bfloat16":
        round_to_bfloat16(model)
    model.save_pretrained(folder, **saving)
    return load(folder, component, dtype)


def run(function: Callable[..., Any], module: nnx.Module, *args: Any) -> Any:
    """`function(module, *args)`, compiled with the weights as arguments."""
    return ModuleFunction(function).bind(module)(*map(jnp.asarray, args))
