"""Modules as flat dictionaries: dotted parameter path to array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)
# Arrays; of an abstract module, their shapes.
Flat = dict[str, Any]


def parameter_path(path: tuple[Any, ...]) -> str:
    """The public name of a parameter: "double_blocks.0.img_attn.qkv.weight"."""
    return ".".join(str(part) for part in path)


def to_flat(module: nnx.Module) -> Flat:
    """Every parameter of a module by its dotted path.

    Of a module from `nnx.eval_shape`, the values are `jax.ShapeDtypeStruct`s.
    """
    # Not `nnx.to_flat_state`, nor a filter: both leave reference cycles, which would keep the
    # arrays of a module that is dropped until the garbage collector comes by.
    found = _variables(nnx.state(module), ())
    return {parameter_path(path): v.get_value() for path, v in found}


def _variables(
    node: Mapping[Any, Any], path: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], nnx.Variable]]:
    for key, value in node.items():
        if isinstance(value, nnx.Variable):
            yield (*path, key), value
        else:
            yield from _variables(value, (*path, key))


def split_flat(module: Module) -> tuple[Callable[[Mapping[str, jax.Array]], Module], Flat]:
    """Take a module apart, so that it can be used in pure functions.

    Returns:
      (rebuild, parameters): `rebuild(parameters)` is the module with these values. The values may
      be traced, and of another dtype than before.
    """
    # As a pytree: `nnx.merge`, too, leaves reference cycles (see `to_flat`).
    found, structure = jax.tree_util.tree_flatten_with_path(module)
    # Without the last key, which is a variable's value.
    flat = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="."): value for path, value in found
    }

    def rebuild(values: Mapping[str, jax.Array]) -> Module:
        return jax.tree.unflatten(structure, [values[path] for path in flat])

    return rebuild, flat
