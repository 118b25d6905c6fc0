"""The linears of a module by dotted path, and the exchange of one kind for another in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from flux_jax.layers import Linear


def linears(module: nnx.Module, kinds: type | tuple[type, ...] = Linear) -> dict[str, Any]:
    """The linears of a module by dotted path, in the order of their paths."""
    found = {
        ".".join(map(str, path)): child
        for path, child in nnx.iter_modules(module)
        if isinstance(child, kinds)
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def replace_linears(
    module: nnx.Module, names: Sequence[str], make: Callable[[str, Any], Any]
) -> None:
    """Put `make(name, linear)` in the place of each named linear."""
    for name in names:
        *parents, last = name.split(".")
        parent: Any = module
        for part in parents:
            parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
        setattr(parent, last, make(name, getattr(parent, last)))


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts block 2 before block 10."""
    parts = name.split(".")
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)
