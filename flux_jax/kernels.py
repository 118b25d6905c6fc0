"""Which kernels compute a transformer's step: the user's choice, checked and put into layers."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from flux_jax import arguments, attention
from flux_jax.errors import UserError
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
        reference.
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


def _check_kernels(transformer: FluxTransformer, kernels: str) -> None:
    # Late, as everything of `pallas_kernels`.
    from pallas_kernels.backends import BACKENDS, why_not

    arguments.choice("kernels", kernels, BACKENDS)
    weight = transformer.img_in.weight[...]
    devices = weight.devices()
    if kernels != "jax" and len(devices) > 1:
        raise UserError(
            f"kernels={kernels!r} cannot run on a mesh of {len(devices)} devices, which XLA "
            "partitions plain JAX for; use kernels='jax' or None"
        )
    reason = why_not(kernels, next(iter(devices)), weight.dtype, weight.dtype, 16)
    if reason is not None:
        raise UserError(f"kernels={kernels!r} cannot run here: {reason}; use 'jax' or None")


def _check_attention(transformer: FluxTransformer, name: str) -> None:
    arguments.choice("attention", name, attention.IMPLEMENTATIONS)
    config, dtype = transformer.config, transformer.img_in.weight.dtype
    # Any length that suits them all.
    shape = jax.ShapeDtypeStruct((1, 256, config.num_heads, config.head_dim), jnp.dtype(dtype))
    reason = attention.why_not(name, shape, shape, masked=False)
    if reason is not None:
        raise UserError(f"attention={name!r} cannot run here: {reason}")
