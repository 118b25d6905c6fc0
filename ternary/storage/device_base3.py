"""Base-3 bytes to the 2-bit layout on a device: what `base3` does on the host, in one program.

FLUX.1-dev has twelve billion of these digits: half a minute of two cores, milliseconds of a GPU.
And the host's threads, which would take the interpreter for every few operations on arrays, leave
it to whatever else a process does when it starts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels import pack_codes
from ternary.storage.base3 import DIGITS, LARGEST, check_bytes, check_width


def base3_to_packed_on(
    device: jax.Device, data: UInt8[np.ndarray, "N P"], in_features: int, *, what: str = "data"
) -> UInt8[Array, "N Kp"]:
    """As `ternary.storage.base3.base3_to_packed`, on a device; arguments and errors as there."""
    check_width(data, in_features, what)
    packed, largest = _decode(jax.device_put(data, device), in_features)
    if largest > LARGEST:
        check_bytes(data, what)
    return packed


@functools.partial(jax.jit, static_argnames="in_features")
def _decode(
    data: UInt8[Array, "N P"], in_features: int
) -> tuple[UInt8[Array, "N Kp"], UInt8[Array, ""]]:
    digits = [data // np.uint8(3**digit) % np.uint8(3) for digit in range(DIGITS)]
    codes = jnp.concatenate(digits, axis=1)[:, :in_features]
    return pack_codes(codes), jnp.max(data, initial=0)
