"""The parts of a pipeline from a checkpoint, whatever its layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flux_jax.checkpoint import load_checkpoint
from flux_jax.errors import UserError
from flux_jax.prompts import TextEncoders
from flux_jax.tokenization import load_tokenizer

_TEXT = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_IMAGE = ("transformer", "vae")


def load_text_encoders(
    path: str | Path, *, dtype: Any, mesh: jax.sharding.Mesh | None, offload: bool
) -> TextEncoders:
    """Both text encoders with their tokenizers; arguments as for `FluxPipeline.from_pretrained`.

    Raises:
      UserError: a checkpoint without an encoder or tokenizer.
    """
    checkpoint = load_checkpoint(path, components=_TEXT, dtype=check_dtype(dtype), mesh=mesh)
    missing = [name for name in _TOKENIZERS if name not in checkpoint.tokenizer_paths]
    if missing:
        raise UserError(f"{path} has no {' and no '.join(missing)}, which prompts need")
    return TextEncoders(
        **{name: checkpoint.modules[name] for name in _TEXT},
        **{name: load_tokenizer(checkpoint.tokenizer_paths[name]) for name in _TOKENIZERS},
        offload=offload,
    )


def load_image_parts(
    path: str | Path,
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    given: Mapping[str, nnx.Module],
) -> dict[str, Any]:
    """Transformer, autoencoder and scheduler.

    Args:
      path, dtype, mesh: as for `FluxPipeline.from_pretrained`.
      given: models to use in place of the checkpoint's.

    Raises:
      UserError: a checkpoint without one of them.
    """
    wanted = [name for name in _IMAGE if name not in given]
    checkpoint = load_checkpoint(path, components=wanted, dtype=check_dtype(dtype), mesh=mesh)
    if checkpoint.scheduler is None:
        raise UserError(f"{path} has no scheduler configuration (scheduler/scheduler_config.json)")
    return {"scheduler": checkpoint.scheduler, **checkpoint.modules, **given}


def check_dtype(dtype: Any) -> Any:
    """`dtype` as a NumPy dtype, bfloat16 or float32.

    Raises:
      UserError: any other; in float16, T5 and the autoencoder overflow.
    """
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"dtype must be bfloat16 or float32, got {dtype}")
    return resolved
