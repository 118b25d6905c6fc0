"""FLUX.1 in flax.nnx: the model, its pipeline, and the tools around it.

The public names are listed here and loaded on first use: importing the package touches no GPU and
no other framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flux_jax.autoencoder import Autoencoder
    from flux_jax.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
    from flux_jax.clip import CLIPTextEncoder
    from flux_jax.configs import (
        AutoencoderConfig,
        CLIPTextConfig,
        FluxConfig,
        SchedulerConfig,
        T5Config,
    )
    from flux_jax.errors import UserError
    from flux_jax.metadata import read_png, save_png
    from flux_jax.pipeline import FluxPipeline
    from flux_jax.prompts import PromptEmbeds, TextEncoders
    from flux_jax.sharding import flat_shardings, make_mesh
    from flux_jax.t5 import T5Encoder
    from flux_jax.transformer import FluxTransformer

_HOME = {
    "Autoencoder": "autoencoder",
    "AutoencoderConfig": "configs",
    "CLIPTextConfig": "configs",
    "CLIPTextEncoder": "clip",
    "FluxConfig": "configs",
    "FluxPipeline": "pipeline",
    "FluxTransformer": "transformer",
    "PromptEmbeds": "prompts",
    "SchedulerConfig": "configs",
    "T5Config": "configs",
    "T5Encoder": "t5",
    "TextEncoders": "prompts",
    "UserError": "errors",
    "flat_shardings": "sharding",
    "inspect_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "make_mesh": "sharding",
    "read_png": "metadata",
    "save_checkpoint": "checkpoint",
    "save_png": "metadata",
}

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "FluxConfig",
    "FluxPipeline",
    "FluxTransformer",
    "PromptEmbeds",
    "SchedulerConfig",
    "T5Config",
    "T5Encoder",
    "TextEncoders",
    "UserError",
    "flat_shardings",
    "inspect_checkpoint",
    "load_checkpoint",
    "make_mesh",
    "read_png",
    "save_checkpoint",
    "save_png",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"flux_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'flux_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
