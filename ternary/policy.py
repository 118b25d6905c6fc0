"""Which linears become ternary: name patterns, and how much of a model they are."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flux_jax.errors import UserError

# Every linear of every block, modulation included. Embedders and the final layer stay.
DEFAULT_PATTERNS = ("double_blocks.*", "single_blocks.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Which linears become ternary, by shell patterns; in them `*` stands for dots too.

    Attributes:
      include: patterns over paths such as "double_blocks.0.img_attn.qkv"; what one of them matches
        becomes ternary.
      exclude: patterns of what does not.

    Raises:
      UserError: no tuple or list of texts.
    """

    include: tuple[str, ...] = DEFAULT_PATTERNS
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    # A text would be taken for its letters.
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UserError(
            f"{name} must be a tuple of patterns, as ('double_blocks.*',), got {value!r:.60}"
        )
    return tuple(value)


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
