"""A short name for a set of weights: equal weights, equal fingerprint, wherever they came from.

Computed from the arrays in memory and not from files, so that a diffusers folder, a single file and
a converted checkpoint of the same weights agree; floats are compared as bfloat16, so that the
dtype they were loaded in does not matter either. It tells checkpoints apart, it does not
authenticate them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from flux_jax.tree import to_flat

DIGITS = 16


@jax.jit
def _checksum(array: jax.Array | np.ndarray) -> UInt32[Array, ""]:
    """The sum modulo 2^32 of every element's bits, mixed with its position.

    Integer sums do not depend on their order: any sharding and any backend give the same.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)
    bits = array.astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(array.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position = position * np.uint32(size % 2**32) + index
    # Multiply and shift as hash functions do: each bit of the input reaches most of the output.
    mixed = (bits ^ (position * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0xC2B2AE3D)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


# Below this many elements compiling `_checksum` for a shape takes longer than NumPy takes.
_SMALL = 1 << 22


def _checksum_on_host(array: np.ndarray) -> int:
    """`_checksum` in NumPy."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.bfloat16).view(np.uint16)
    bits = array.reshape(-1).astype(np.uint32)
    position = np.arange(bits.size, dtype=np.uint32)
    mixed = (bits ^ (position * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2AE3D)
    return int(np.sum(mixed ^ (mixed >> np.uint32(13)), dtype=np.uint32))


def _is_near(array: jax.Array | np.ndarray) -> bool:
    """Whether an array is in host memory as a whole."""
    if isinstance(array, np.ndarray):
        return True
    return array.is_fully_addressable and {d.platform for d in array.devices()} == {"cpu"}


def component_digest(name: str, module: nnx.Module) -> str:
    """The digest of one component's weights.

    Args:
      name: of the component.
      module: its arrays may be on devices, sharded, or on the host.
    """
    return digest(name, to_flat(module).items())


class Checksum(NamedTuple):
    """The checksum of one array.

    Attributes:
      shape: of the array.
      value: 32 bits; on its device until it is asked for.
    """

    shape: tuple[int, ...]
    value: Any


def checksum(array: jax.Array | np.ndarray) -> Checksum:
    """The checksum of an array on devices, sharded, or on the host."""
    on_host = array.size < _SMALL and _is_near(array)
    value = _checksum_on_host(np.asarray(array)) if on_host else _checksum(array)
    return Checksum(array.shape, value)


def digest(name: str, parameters: Iterable[tuple[str, jax.Array | np.ndarray]]) -> str:
    """As `component_digest`, of (dotted path, array) in any order, each looked at once."""
    sums = {}
    for path, array in parameters:
        sums[path] = checksum(array)
        if isinstance(array, np.ndarray):
            # What was copied for it leaves the device before the next one arrives.
            jax.block_until_ready(sums[path].value)
    return digest_of_sums(name, sums)


def digest_of_sums(name: str, sums: Mapping[str, Checksum]) -> str:
    """As `component_digest`, of every array's checksum by dotted path."""
    found = hashlib.sha256()
    values = jax.device_get({path: one.value for path, one in sums.items()})
    for path, value in sorted(values.items()):
        found.update(f"{name}.{path} {sums[path].shape} {int(value):08x}\n".encode())
    return found.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """The fingerprint of a model.

    Args:
      digests: component name to `component_digest`.

    Returns:
      16 hexadecimal digits.
    """
    joined = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(joined.encode()).hexdigest()[:DIGITS]
