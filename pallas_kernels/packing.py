"""The 2-bit layout of ternary weights in memory and in kernels.

A weight matrix is (N, K): N output features, K inputs. Each weight is one of three codes:

    code 0 is -1, code 1 is 0, code 2 is +1; code 3 is never written

Four codes share a byte, low bits first. They are not neighbours: a row is cut into blocks of 256
inputs, a block into four planes of 64, and byte j of a block holds the j-th code of every plane.

    packed[n, 64 * b + j] = code(n, 256 * b + j)
                          | code(n, 256 * b + 64 + j)  << 2
                          | code(n, 256 * b + 128 + j) << 4
                          | code(n, 256 * b + 192 + j) << 6        0 <= j < 64

So one shift and one mask turn 64 consecutive bytes into 64 consecutive codes: a kernel decodes
without moving anything between lanes, and a plane is half a scale group.

K that is no multiple of 256 is filled up with code 1 (weight 0): a row is always ceil(K / 256) * 64
bytes, and whatever stands opposite the filling does not count.

Every function here takes NumPy and JAX arrays and returns the same kind.
"""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

BLOCK_BYTES = 64
BLOCK_CODES = 4 * BLOCK_BYTES
# Inputs that share a scale, where the scale is per group.
GROUP = 128

Codes = UInt8[Array, "N K"]
Packed = UInt8[Array, "N Kp"]
HostCodes = UInt8[np.ndarray, "N K"]
HostPacked = UInt8[np.ndarray, "N Kp"]


def packed_width(in_features: int) -> int:
    """Bytes of a packed row of `in_features` codes."""
    return -(-in_features // BLOCK_CODES) * BLOCK_BYTES


def group_count(in_features: int) -> int:
    """Scale groups of a row; the last one may be short."""
    return -(-in_features // GROUP)


@overload
def pack_codes(codes: Codes) -> Packed: ...
@overload
def pack_codes(codes: HostCodes) -> HostPacked: ...
def pack_codes(codes: Codes | HostCodes) -> Packed | HostPacked:
    """Codes to packed bytes.

    Args:
      codes: (N, K) uint8, each 0, 1 or 2: the sign of a weight, and 1. Values are not looked at
        here.

    Returns:
      (N, `packed_width(K)`) uint8.

    Raises:
      ValueError: another dtype, such as that of signs, or no matrix.
    """
    xp: Any = jnp if isinstance(codes, jax.Array) else np
    if codes.dtype != jnp.uint8 or codes.ndim != 2:
        raise ValueError(
            "codes must be a uint8 matrix (N, K) of signs + 1, got "
            f"{codes.dtype} of shape {codes.shape}"
        )
    rows, columns = codes.shape
    width = packed_width(columns)
    filled = xp.pad(codes, ((0, 0), (0, 4 * width - columns)), constant_values=1)
    planes = filled.reshape(rows, width // BLOCK_BYTES, 4, BLOCK_BYTES)
    packed = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return packed.reshape(rows, width)


@overload
def unpack_codes(packed: Packed, in_features: int) -> Codes: ...
@overload
def unpack_codes(packed: HostPacked, in_features: int) -> HostCodes: ...
def unpack_codes(packed: Packed | HostPacked, in_features: int) -> Codes | HostCodes:
    """Packed bytes to codes, the inverse of `pack_codes`.

    Args:
      packed: (N, Kp) uint8.
      in_features: K, with `packed_width(K)` = Kp.

    Returns:
      (N, K) uint8.

    Raises:
      ValueError: K does not fit the packed width.
    """
    xp: Any = jnp if isinstance(packed, jax.Array) else np
    rows, width = packed.shape
    if packed_width(in_features) != width:
        raise ValueError(
            f"packed rows have {width} bytes, expected {packed_width(in_features)} for "
            f"{in_features} inputs"
        )
    blocks = packed.reshape(rows, width // BLOCK_BYTES, BLOCK_BYTES)
    planes = xp.stack([(blocks >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2)
    return planes.reshape(rows, 4 * width)[:, :in_features]
