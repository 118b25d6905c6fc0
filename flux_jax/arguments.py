"""Checks of what a caller passes to the pipeline: each refusal is one line that says the remedy."""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flux_jax.errors import UserError

# JAX seeds wider than 32 bits are cut silently unless x64 is on.
SEED_LIMIT = 2**32
# Of one call: each has a key, and a record.
IMAGE_LIMIT = 2**20


def integer(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """`value` as an int of at least `least`, and of at most `most` if that is given."""
    whole = _as_int(value)
    if whole is None or not least <= whole <= (most or whole):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} must be a whole number {allowed}, got {value!r}")
    return whole


def finite(name: str, value: Any) -> float:
    """`value` as a finite float."""
    number = _as_float(value)
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, got {repr(value)[:40]}")
    return number


def scale(name: str, value: Any) -> float:
    """`value` as a finite float that is not negative."""
    number = _as_float(value)
    if not 0 <= number < math.inf:
        raise UserError(f"{name} must be a finite number of at least 0, got {repr(value)[:40]}")
    return number


def _as_float(value: Any) -> float:
    """NaN for what is no number, or an array of no dimension that holds one."""
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or _is_scalar(value)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        # An integer may be beyond any float.
        return math.inf
    except TypeError:
        # Of an array that is being traced, nobody knows the value.
        return math.nan


def _as_int(value: Any) -> int | None:
    """None for what is no integer, or an array of no dimension that holds one."""
    if isinstance(value, bool) or not (isinstance(value, numbers.Integral) or _is_scalar(value)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_scalar(value: Any) -> bool:
    """Whether a value is an array of no dimension that holds a number."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "shape", None) != ():
        return False
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, which must be one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_shapes(given: Mapping[str, Any], expected: Mapping[str, Sequence[str | int]]) -> None:
    """See that arrays have their shapes.

    Args:
      given: by name; what is None or absent is not looked at.
      expected: of each, its dimensions: a size, or a word for one that all with that word share.

    Raises:
      UserError: one has not; of several that share a dimension, the first says what it is.
    """
    found: dict[Any, int] = {}
    for name, dimensions in expected.items():
        if given.get(name) is None:
            continue
        shape = tuple(np.shape(given[name]))
        sizes = [found.get(each, each) for each in dimensions]
        if len(shape) != len(sizes) or any(
            isinstance(size, int) and size != here for size, here in zip(sizes, shape, strict=True)
        ):
            wanted = [
                f"{each}={size}" if isinstance(each, str) and size != each else str(size)
                for each, size in zip(dimensions, sizes, strict=True)
            ]
            raise UserError(f"{name} must have shape ({', '.join(wanted)}), got {shape}")
        found |= dict(zip(dimensions, shape, strict=True))


def texts(name: str, value: Any) -> list[str]:
    """One text or a sequence of them, as a list."""
    items = [value] if isinstance(value, str) else value
    if (
        not isinstance(items, Sequence)
        or len(items) == 0
        or not all(isinstance(item, str) for item in items)
    ):
        raise UserError(f"{name} must be a text or a non-empty list of texts, got {value!r}")
    for item in items:
        try:
            item.encode()
        except UnicodeEncodeError:
            # As Python reads bytes on a command line that are no UTF-8.
            raise UserError(f"{name} must be text in UTF-8, got {item[:80]!a}") from None
    return list(items)


def seeds_and_keys(
    seed: Any, key: Any, count: int
) -> tuple[tuple[int | None, ...], Sequence[Array]]:
    """The seed, if there is one, and the random key of each of `count` images.

    One integer seed gives image i the seed `seed + i`; no seed draws one. One key gives image i
    `jax.random.fold_in(key, i)`. A list or array of seeds, or an array of keys, names every image's
    own.

    Args:
      seed: None, an integer, or `count` integers, each in [0, 2**32); of NumPy and JAX too.
      key: None, or a typed JAX key or `count` of them (`jax.random.key`, not `PRNGKey`).
      count: number of images.

    Returns:
      (seeds, keys): `count` seeds (None where a key was given), and as many typed keys.
    """
    if key is not None:
        if seed is not None:
            raise UserError(f"pass seed or key, not both, got seed={seed!r} and a key")
        return (None,) * count, list(_keys(key, count))
    if count > IMAGE_LIMIT:
        raise UserError(f"{count} images are too many for one call, which draws at most 2**20")
    if seed is None:
        seed = secrets.randbelow(SEED_LIMIT - count)
    if _as_int(seed) is not None:
        first = integer("seed", seed, least=0)
        seeds = tuple(range(first, first + count))
    else:
        # Several at a time, as Python's numbers.
        listed = np.asarray(seed).tolist() if len(getattr(seed, "shape", ())) == 1 else seed
        if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != count:
            raise UserError(
                f"seed must be one integer or a list of {count}, one per image, got {seed!r}"
            )
        seeds = tuple(integer("seed", each, least=0) for each in listed)
    if max(seeds) >= SEED_LIMIT:
        raise UserError(f"seed must be below 2**32 for every image, got {max(seeds)}")
    return seeds, [_key(each) for each in seeds]


def _key(seed: int) -> Array:
    # Placed explicitly, for who forbids other transfers (`jax_transfer_guard`). The generator is
    # named, for the same noise whatever jax_default_prng_impl says.
    return jax.random.key(jax.device_put(np.uint32(seed)), impl="threefry2x32")


_folded = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def _keys(key: Any, count: int) -> Array:
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UserError(f"key must be a typed JAX key, as from jax.random.key(0), got {key!r}")
    if key.shape == ():
        return _folded(key, jax.device_put(np.arange(count, dtype=np.uint32)))
    if key.shape != (count,):
        raise UserError(
            f"key must be one key or an array of {count}, one per image, got shape {key.shape}"
        )
    return key


def initial_latents(latents: Any, shape: tuple[int, int, int]) -> Float[np.ndarray, "N I P"]:
    """The caller's noise as float32 on the host, checked against the images asked for."""
    try:
        array = np.asarray(latents, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"latents must be an array of numbers: {error}") from error
    if array.shape != shape:
        raise UserError(
            f"latents must have shape {shape} (images, image tokens, channels of a token; see "
            f"flux_jax.latents.pack), got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise UserError("latents must be finite, got NaN or infinity in them")
    return array


def dtype(value: Any) -> Any:
    """`value` as a NumPy dtype, bfloat16 or float32.

    Raises:
      UserError: any other; in float16, T5 and the autoencoder overflow.
    """
    try:
        resolved = jnp.dtype(value)
    except TypeError:
        resolved = None
    if resolved not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"dtype must be bfloat16 or float32, got {value}")
    return resolved
