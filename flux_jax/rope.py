"""Position: rotary embedding over (index, row, column) and the sinusoidal embedding of scalars.

Follows `src/flux/math.py` and `timestep_embedding` of Black Forest Labs' reference, in float32
whatever the model's dtype: bf16 keeps 8 bits, and would round position 257 to 256 and a time of
0.9 x 1000 to 900 +- 4.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

# Of the sinusoids, as in the reference's `timestep_embedding`.
_MAX_PERIOD = 10_000.0

Rotation = tuple[Float[Array, "L D2"], Float[Array, "L D2"]]


def rotary_angles(
    ids: Int[Array, "L A"] | Float[Array, "L A"], axes_dim: tuple[int, ...], theta: float
) -> Rotation:
    """Cosines and sines of every position's rotations.

    Args:
      ids: position of each token along every axis.
      axes_dim: rotary width of each axis.
      theta: base of the frequencies.

    Returns:
      (cos, sin), each (L, sum(axes_dim) / 2), float32.
    """
    positions = ids.astype(jnp.float32)
    angles = []
    for axis, width in enumerate(axes_dim):
        omega = (1.0 / theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
        angles.append(positions[:, axis, None] * jnp.asarray(omega)[None, :])
    joined = jnp.concatenate(angles, axis=-1)
    return jnp.cos(joined), jnp.sin(joined)


def sinusoidal_embedding(values: Num[Array, " B"], width: int) -> Float[Array, "B width"]:
    """cos and sin of `1000 * values` at `width / 2` frequencies, float32.

    In 16 bits Black Forest Labs' code and diffusers round the values before and after they multiply
    by 1000, and not alike: in bfloat16 a guidance of 3.5 is 3504 to both, and the times of a third
    of the steps differ between the two.

    Args:
      values: the time in [0, 1] or the guidance scale of each row.
      width: even.
    """
    half = width // 2
    frequencies = np.exp(-math.log(_MAX_PERIOD) * np.arange(half) / half).astype(np.float32)
    angles = 1000.0 * values.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), axis=-1)


def image_ids(height: int, width: int) -> Int[np.ndarray, "L 3"]:
    """Positions (0, row, column) of a grid of `height` x `width` image tokens, row by row."""
    grid = np.zeros((height, width, 3), np.int32)
    grid[..., 1] = np.arange(height)[:, None]
    grid[..., 2] = np.arange(width)[None, :]
    return grid.reshape(-1, 3)


def text_ids(length: int) -> Int[np.ndarray, "L 3"]:
    """Positions of the text tokens: all zero in FLUX."""
    return np.zeros((length, 3), np.int32)
