"""Models with random weights of a trained model's scale, drawn where they will lie.

No zeros but ternary ones: a product of zeros runs faster than one of real data.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.scaled_weights import moments, ternary_layers
from flux_jax.components import abstract_module
from flux_jax.configs import AutoencoderConfig, FluxConfig
from flux_jax.linears import linears
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.sharding import flat_shardings
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat
from ternary.config import QuantConfig
from ternary.layers import TernaryLinear
from ternary.storage.checkpoint import abstract_ternary

Module = TypeVar("Module", bound=nnx.Module)


def random_transformer(
    config: FluxConfig, *, activation_bits: int | None = None, mesh: Mesh | None = None
) -> FluxTransformer:
    """A transformer in bf16.

    Args:
      config: its size.
      activation_bits: 8 or 16 for packed ternary weights in the default policy's linears; None for
        dense ones.
      mesh: the devices; the first one by default.
    """
    if activation_bits is None:
        return _filled(abstract_module("transformer", config, jnp.bfloat16), mesh)
    quant = QuantConfig(activation_bits=activation_bits)
    return _filled(abstract_ternary(config, ternary_layers(config), quant, jnp.bfloat16), mesh)


def random_autoencoder(config: AutoencoderConfig, mesh: Mesh | None = None) -> Any:
    """An autoencoder in bf16."""
    return _filled(abstract_module("vae", config, jnp.bfloat16), mesh)


def random_embeds(config: FluxConfig, count: int, text_tokens: int) -> PromptEmbeds:
    """Encoded prompts in bf16, as the text encoders of a transformer would give them."""
    random = np.random.default_rng(1)
    shapes = (count, text_tokens, config.context_in_dim), (count, config.vec_in_dim)
    states, pooled = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes)
    return PromptEmbeds(prompts=("",) * count, prompt_embeds=states, pooled_prompt_embeds=pooled)


def _filled(abstract: Module, mesh: Mesh | None) -> Module:
    """A module of shapes alone with its values, drawn one after the other: their peak is small."""
    rebuild, shapes = split_flat(abstract)
    places = {} if mesh is None else flat_shardings(abstract, mesh)
    packed = linears(abstract, TernaryLinear)
    # A program for each shape, not for each of 780 parameters.
    program = functools.cache(_program)
    filled = {}
    for name, leaf in shapes.items():
        layer, _, last = name.rpartition(".")
        if layer in packed and last == "packed":
            distribution = None
        elif layer in packed and last == "scale":
            # Half of the codes below are not zero.
            distribution = (packed[layer].in_features / 2) ** -0.5, 0.0
        else:
            distribution = moments(name, leaf.shape)
        draw = program(leaf.shape, leaf.dtype, places.get(name), distribution)
        key = jax.random.key(zlib.crc32(name.encode()), impl="rbg")
        filled[name] = jax.block_until_ready(draw(key))
    return rebuild(filled)


def _program(
    shape: tuple[int, ...], dtype: Any, place: Any, distribution: tuple[float, float] | None
) -> Any:
    """What draws a tensor from a key: normal numbers of a mean and a deviation, or packed codes."""

    def value(key: jax.Array) -> jax.Array:
        if distribution is None:
            # The sum of two random bits in each pair: 0, 1, 2 with 1, 2, 1 of 4.
            bits = jax.random.bits(key, shape, jnp.uint8)
            return (bits & 0x55) + ((bits >> 1) & 0x55)
        mean, deviation = distribution
        return (mean + deviation * jax.random.normal(key, shape, dtype)).astype(dtype)

    return jax.jit(value, out_shardings=place)
