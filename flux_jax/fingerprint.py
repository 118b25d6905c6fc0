"""A short name for a model: equal weights and settings, equal fingerprint, whatever their source.

Computed from the arrays and configurations in memory and not from files, so that a diffusers
folder, a single file and a converted checkpoint of the same model agree; floats are compared as
bfloat16, so that the dtype they were loaded in does not matter either. It tells models apart, it
does not authenticate them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from flux_jax.tree import parameter_path, to_flat

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
    return digest_of_sums(name, checksums(to_flat(module).items()))


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


def checksums(parameters: Iterable[tuple[str, jax.Array | np.ndarray]]) -> dict[str, Checksum]:
    """The checksums of (dotted path, array) in any order, each looked at once."""
    sums = {}
    for path, array in parameters:
        sums[path] = checksum(array)
        if isinstance(array, np.ndarray):
            # What was copied for it leaves the device before the next one arrives.
            jax.block_until_ready(sums[path].value)
    return sums


def digest_of_sums(name: str, sums: Mapping[str, Checksum]) -> str:
    """As `component_digest`, of every array's checksum by dotted path."""
    found = hashlib.sha256()
    values = jax.device_get({path: one.value for path, one in sums.items()})
    for path, value in sorted(values.items()):
        found.update(f"{name}.{path} {sums[path].shape} {int(value):08x}\n".encode())
    return found.hexdigest()


# Fields of configurations that no picture depends on: what an image's own record says instead.
_RECORDED = ("sample_size",)


def component_settings(module: Any) -> str:
    """What a component computes with, beside its weights.

    Args:
      module: with a `config`; the layers of an nnx module may have `activation_bits`, their own or
        those of their `config`.
    """
    lines = [config_settings(module.config)]
    if isinstance(module, nnx.Module):
        for path, layer in nnx.iter_modules(module):
            bits = getattr(layer, "activation_bits", None)
            bits = bits or getattr(getattr(layer, "config", None), "activation_bits", None)
            if bits is not None:
                lines.append(f"{parameter_path(path)} activation_bits={bits}")
    return " ".join(sorted(lines))


def config_settings(config: Any) -> str:
    """A configuration's fields in one line; numbers are equal whatever their type.

    What has its default is left out: a field that a later version adds changes no fingerprint.
    """
    fields = sorted(dataclasses.fields(config), key=lambda field: field.name)
    values = [(field.name, getattr(config, field.name), field.default) for field in fields]
    return " ".join(
        f"{name}={_plain(value)!r}"
        for name, value, default in values
        if name not in _RECORDED and value != default
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    # JSON has 10000 or 10000.0.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_number else value


def fingerprint(digests: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """The fingerprint of a model, 16 hexadecimal digits.

    Args:
      digests: component name to `component_digest`.
      settings: name to `component_settings`, and those of the scheduler.
    """
    lines = [f"{name} {digest}" for name, digest in sorted(digests.items())]
    lines += [f"{name} {line}" for name, line in sorted(settings.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]
