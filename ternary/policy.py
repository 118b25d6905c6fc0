"""Which linears become ternary: name patterns, and the exchange of layers in place."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from flux_jax.errors import UserError
from flux_jax.layers import Linear

# Every linear of every block, modulation included. Embedders and the final layer stay.
DEFAULT_PATTERNS = ("double_blocks.*", "single_blocks.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Shell patterns over the dotted paths of linears, as in "double_blocks.0.img_attn.qkv".

    `*` stands for any characters, dots too.

    Attributes:
      include: a linear that one of them matches becomes ternary,
      exclude: unless one of these matches it.
    """

    include: tuple[str, ...] = DEFAULT_PATTERNS
    exclude: tuple[str, ...] = ()


def linears(module: nnx.Module, kinds: type | tuple[type, ...] = Linear) -> dict[str, Any]:
    """The linears of a module by dotted path, in the order of their paths."""
    found = {
        ".".join(map(str, path)): child
        for path, child in nnx.iter_modules(module)
        if isinstance(child, kinds)
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def select(names: Sequence[str], policy: Policy) -> list[str]:
    """The names that a policy makes ternary, in order.

    Raises:
      UserError: a pattern that matches nothing, or nothing is left.
    """

    def matched(kind: str, patterns: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            fitting = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not fitting:
                raise UserError(
                    f"{kind} pattern {pattern!r} matches none of the {len(names)} linears; one is "
                    f"called {names[0] if names else '(there are none)'}"
                )
            found.update(fitting)
        return found

    ternary = matched("include", policy.include) - matched("exclude", policy.exclude)
    chosen = [name for name in names if name in ternary]
    if not chosen:
        raise UserError(f"the policy leaves no linear to be ternary: {policy}")
    return chosen


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a model is ternary.

    Attributes:
      ternary: weights that are, biases not counted.
      total: all parameters of the dense model.
    """

    ternary: int
    total: int

    @property
    def fraction(self) -> float:
        """The ternary share of all parameters."""
        return self.ternary / self.total


def coverage(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> Coverage:
    """Count, from the shapes of the dense parameters and the names of the ternary linears."""
    return Coverage(
        ternary=sum(math.prod(shapes[f"{name}.weight"]) for name in names),
        total=sum(math.prod(shape) for shape in shapes.values()),
    )


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts block 2 before block 10."""
    parts = name.split(".")
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)
