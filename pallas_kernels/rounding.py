"""Rounding that a compiler keeps.

`x.astype(float16).astype(float32)` does nothing in a program that XLA compiles for a GPU: more
precision than was asked for is allowed there (`xla_allow_excess_precision`), and so the pair of
conversions is taken out. `lax.reduce_precision` stays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(x: Float[Array, "*B"], dtype: Any) -> Float[Array, "*B"]:
    """`x` as `dtype` stores it, halves to even, in its own type.

    Args:
      x: floating, of at least the precision of `dtype`.
      dtype: floating.
    """
    info = jnp.finfo(dtype)
    nearest = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.minexp == jnp.finfo(x.dtype).minexp:
        return nearest
    # `reduce_precision` makes 0 of what `dtype` stores without a leading one.
    step = float(info.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x / step) * step, nearest)
