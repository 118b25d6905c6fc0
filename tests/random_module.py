"""Components with random weights, drawn by NumPy: no initialiser is compiled for each shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.components import abstract_module


def random_module(name: str, config: Any, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """A component whose vectors are near one and whose linears keep their input's magnitude."""
    graphdef, state = nnx.split(abstract_module(name, config, dtype))
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            values = 1 + 0.2 * values
        else:
            values /= np.sqrt(np.prod(leaf.shape[1:]))
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, state))
