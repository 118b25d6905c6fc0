"""Which kernels compute a transformer's step: the user's choice, checked and put into layers."""

from __future__ import annotations

from typing import cast

import jax
from flax import nnx

from flux_jax import arguments, attention
from flux_jax.errors import UserError
from flux_jax.sharding import axis_size
from flux_jax.transformer import DoubleStreamBlock, FluxTransformer, SingleStreamBlock


def use_kernels(
    transformer: FluxTransformer,
    *,
    kernels: str | None = None,
    attention_by: str | None = None,
) -> None:
    """Names the kernels of every layer; None leaves a choice to where it is made by itself.

    The names become part of the transformer's structure: a program that was compiled for others is
    not used again. The text encoders and the autoencoder have none.

    Args:
      transformer: is changed.
      kernels: a backend of `pallas_kernels`, of all linears with packed weights. "jax" is the
        reference, also of what prepares an attention; with any other, Triton does that where it
        can.
      attention_by: an implementation of `flux_jax.attention`.

    Raises:
      UserError: no such name, or what it names cannot run where the weights are.
    """
    if kernels is not None:
        _check_kernels(transformer, kernels)
    if attention_by is not None:
        _check_attention(transformer, attention_by)
    for _, module in nnx.iter_modules(transformer):
        if hasattr(module, "backend"):
            vars(module)["backend"] = kernels
        if isinstance(module, DoubleStreamBlock | SingleStreamBlock):
            module.attention = cast(attention.Implementation | None, attention_by)
            module.heads_backend = "jax" if kernels == "jax" else None
    suit_mesh(transformer)


def suit_mesh(transformer: FluxTransformer) -> None:
    """Leaves what has no named kernel to plain JAX where weights are split."""
    if _splits_weights(transformer):
        leave_to_xla(transformer)


def leave_to_xla(transformer: FluxTransformer) -> None:
    """Plain JAX for what has no named kernel: for programs that XLA partitions, as in training.

    For the sake of a kernel XLA would gather whole weights and all tokens on every device.

    Args:
      transformer: is changed.
    """
    for _, module in nnx.iter_modules(transformer):
        if hasattr(module, "backend") and vars(module)["backend"] is None:
            vars(module)["backend"] = "jax"
        if isinstance(module, DoubleStreamBlock | SingleStreamBlock):
            module.heads_backend = module.heads_backend or "jax"


def _splits_weights(transformer: FluxTransformer) -> bool:
    mesh = transformer.mesh
    return mesh is not None and any(axis_size(mesh, axis) > 1 for axis in ("fsdp", "tensor"))


def _check_kernels(transformer: FluxTransformer, kernels: str) -> None:
    # Late, as everything of `pallas_kernels`.
    from pallas_kernels.backends import BACKENDS, why_not

    arguments.choice("kernels", kernels, BACKENDS)
    if kernels != "jax" and _splits_weights(transformer):
        raise UserError(
            f"kernels={kernels!r} cannot run on weights that are split over fsdp or tensor: XLA "
            "partitions plain JAX; use kernels='jax' or None, or a mesh of data and sequence"
        )
    dtype = transformer.dtype
    reason = why_not(kernels, transformer.device, dtype, dtype, 16)
    if reason is not None:
        raise UserError(f"kernels={kernels!r} cannot run here: {reason}; use 'jax' or None")


def _check_attention(transformer: FluxTransformer, name: str) -> None:
    arguments.choice("attention", name, attention.IMPLEMENTATIONS)
    config = transformer.config
    # Any length that suits them all.
    shape = jax.ShapeDtypeStruct((1, 256, config.num_heads, config.head_dim), transformer.dtype)
    reason = attention.why_not(name, shape, shape, masked=False)
    if reason is not None:
        raise UserError(f"attention={name!r} cannot run here: {reason}")
