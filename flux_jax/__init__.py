"""FLUX.1 in flax.nnx: the model, its pipeline, and the tools around it.

The public names are listed here and loaded on first use: importing the package touches no GPU and
no other framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flux_jax.autoencoder import Autoencoder as Autoencoder
    from flux_jax.checkpoint import inspect_checkpoint as inspect_checkpoint
    from flux_jax.checkpoint import load_checkpoint as load_checkpoint
    from flux_jax.checkpoint import load_lora as load_lora
    from flux_jax.checkpoint import save_checkpoint as save_checkpoint
    from flux_jax.checkpoint import save_lora as save_lora
    from flux_jax.clip import CLIPTextEncoder as CLIPTextEncoder
    from flux_jax.configs import AutoencoderConfig as AutoencoderConfig
    from flux_jax.configs import CLIPTextConfig as CLIPTextConfig
    from flux_jax.configs import FluxConfig as FluxConfig
    from flux_jax.configs import SchedulerConfig as SchedulerConfig
    from flux_jax.configs import T5Config as T5Config
    from flux_jax.errors import UserError as UserError
    from flux_jax.lora import LoRA as LoRA
    from flux_jax.metadata import read_png as read_png
    from flux_jax.metadata import save_png as save_png
    from flux_jax.pipeline import FluxPipeline as FluxPipeline
    from flux_jax.prompt_embeds import PromptEmbeds as PromptEmbeds
    from flux_jax.prompts import TextEncoders as TextEncoders
    from flux_jax.rope import image_ids as image_ids
    from flux_jax.rope import text_ids as text_ids
    from flux_jax.sharding import flat_shardings as flat_shardings
    from flux_jax.sharding import make_mesh as make_mesh
    from flux_jax.t5 import T5Encoder as T5Encoder
    from flux_jax.transformer import FluxTransformer as FluxTransformer

_HOME = {
    "Autoencoder": "autoencoder",
    "AutoencoderConfig": "configs",
    "CLIPTextConfig": "configs",
    "CLIPTextEncoder": "clip",
    "FluxConfig": "configs",
    "FluxPipeline": "pipeline",
    "FluxTransformer": "transformer",
    "LoRA": "lora",
    "PromptEmbeds": "prompt_embeds",
    "SchedulerConfig": "configs",
    "T5Config": "configs",
    "T5Encoder": "t5",
    "TextEncoders": "prompts",
    "UserError": "errors",
    "flat_shardings": "sharding",
    "image_ids": "rope",
    "inspect_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_lora": "checkpoint",
    "make_mesh": "sharding",
    "read_png": "metadata",
    "save_checkpoint": "checkpoint",
    "save_lora": "checkpoint",
    "save_png": "metadata",
    "text_ids": "rope",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
