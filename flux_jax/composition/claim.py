"""Claims: what a caption asserts of a picture, apart from the words it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flux_jax.composition.vocabulary import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    is_held_out_arrangement,
    is_held_out_pair,
)


def _check(name: str, value: str | None, allowed: Any) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` objects of one shape; `color` and `size` are None where nothing is said of them."""

    shape: str
    count: int = 1
    color: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape: expected one of {', '.join(SHAPES)}; got {self.shape!r}")
        if not 1 <= self.count <= MAX_OBJECTS:
            raise ValueError(f"count: expected 1 to {MAX_OBJECTS}; got {self.count}")
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Groups of objects, perhaps a relation between the first two, perhaps a background.

    Invariants: one to four objects in all; groups of one shape all name their colour, each a
    different one (else no caption could tell them apart); a relation joins exactly two groups of
    one object each. Raises ValueError otherwise.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _check("relation", self.relation, RELATIONS)
        _check("background", self.background, BACKGROUNDS)
        total = sum(group.count for group in self.groups)
        if not 1 <= total <= MAX_OBJECTS:
            raise ValueError(f"groups: expected 1 to {MAX_OBJECTS} objects in all; got {total}")
        if self.relation is not None and [group.count for group in self.groups] != [1, 1]:
            raise ValueError(
                "relation: it joins two groups of one object each; got counts "
                f"{[group.count for group in self.groups]}"
            )
        for shape in {group.shape for group in self.groups}:
            colors = [group.color for group in self.groups if group.shape == shape]
            if len(colors) > 1 and (None in colors or len(set(colors)) < len(colors)):
                raise ValueError(
                    f"groups: several of shape {shape!r} need a colour each, all different; "
                    f"got {colors}"
                )

    @property
    def held_out_pair(self) -> bool:
        """Whether it names a colour and shape that never meet in training."""
        return any(
            group.color is not None and is_held_out_pair(group.color, group.shape)
            for group in self.groups
        )

    @property
    def held_out_arrangement(self) -> bool:
        """Whether it names an arrangement that never occurs in training."""
        if self.relation is None:
            return False
        first, second = self.groups
        return is_held_out_arrangement(self.relation, first.shape, second.shape)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what is unsaid."""
        groups = [
            {key: value for key, value in vars(group).items() if value is not None}
            for group in self.groups
        ]
        extras = {"relation": self.relation, "background": self.background}
        return {"groups": groups, **{key: value for key, value in extras.items() if value}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Claim:
        """The inverse of `to_dict`."""
        groups = tuple(Group(**group) for group in values["groups"])
        return cls(groups=groups, **{k: v for k, v in values.items() if k != "groups"})
