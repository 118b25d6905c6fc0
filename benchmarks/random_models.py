"""Models with random weights of a trained model's scale, drawn where they will lie on a mesh."""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flux_jax.autoencoder import Autoencoder
from flux_jax.configs import AutoencoderConfig, FluxConfig
from flux_jax.sharding import flat_shardings
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat
from pallas_kernels import pack_codes
from ternary.config import QuantConfig
from ternary.policy import Policy
from ternary.student import freeze_student, make_student

Module = TypeVar("Module", bound=nnx.Module)


def random_transformer(config: FluxConfig, mesh: Mesh, *, ternary: bool = False) -> FluxTransformer:
    """A transformer in bf16.

    Args:
      config: its size.
      mesh: the devices.
      ternary: the blocks' linears packed, W1.58A8.
    """

    def made() -> FluxTransformer:
        dense = FluxTransformer(config, rngs=nnx.Rngs(0))
        if not ternary:
            return dense
        return freeze_student(make_student(dense, QuantConfig(activation_bits=8), Policy()))

    return _filled(nnx.eval_shape(made), mesh)


def random_autoencoder(config: AutoencoderConfig, mesh: Mesh) -> Autoencoder:
    """An autoencoder in bf16."""
    return _filled(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))), mesh)


def _filled(abstract: Module, mesh: Mesh) -> Module:
    rebuild, shapes = split_flat(abstract)
    places = flat_shardings(abstract, mesh)
    # A program for each shape, not for each of 780 parameters.
    program = functools.cache(_program)
    filled = {}
    for name, leaf in shapes.items():
        key = jax.random.key(zlib.crc32(name.encode()), impl="rbg")
        last = name.rpartition(".")[2]
        filled[name] = program(last, leaf.shape, leaf.dtype, places[name])(key)
    return rebuild(filled)


def _program(name: str, shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    def value(key: jax.Array) -> jax.Array:
        if name == "packed":
            return pack_codes(jax.random.randint(key, (shape[0], 4 * shape[1]), 0, 3, jnp.uint8))
        normal = jax.random.normal(key, shape, dtype)
        if len(shape) > 1:
            return normal * math.prod(shape[1:]) ** -0.5
        if dtype == jnp.float16:
            # Of a ternary weight with FLUX.1's usual 3072 inputs, two thirds of them not zero.
            return jnp.full(shape, (1.5 / 3072) ** 0.5, dtype)
        return 0.02 * normal if name == "bias" else 1.0 + 0.1 * normal

    return jax.jit(value, out_shardings=place)
