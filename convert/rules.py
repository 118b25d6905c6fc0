"""Name maps between checkpoint ecosystems: tables that can be read either way.

A `Map` is a table of `Rule`s from another ecosystem's tensor names (the *source*) to ours (the
*target*). Every transform is a placement of whole rows, so it too can be read either way. What a
conversion does with a map is in `plan`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

from convert.transforms import IDENTITY, Run, Shape, Transform

_PLACE = re.compile(r"\{([^{}]*)\}")
_KINDS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias", "name": ".+"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a map: a source of this name fills `target` through `transform`.

    Both names are templates, of literal text and of places that stand for the same on either side:
    `{i}` and `{j}` for numbers, `{p}` for `weight` or `bias`, `{a|b}` for one of the words in it,
    and `{name}` for anything.

    Attributes:
      source: the other ecosystem's name.
      target: ours, with the same places.
      transform: placement of the source's rows in the target.
    """

    source: str
    target: str
    transform: Transform = IDENTITY

    def __post_init__(self):
        if set(_PLACE.findall(self.source)) != set(_PLACE.findall(self.target)):
            raise ValueError(
                f"rule {self.source!r} -> {self.target!r} cannot be inverted: a place is on one "
                "side alone"
            )
        # Now, so that a table with a mistake fails where it is made.
        for template in (self.source, self.target):
            _regex(template)

    def target_of(self, source: str) -> str | None:
        """Our name for `source`, or None when the rule is not about it."""
        return _renamed(source, self.source, self.target)

    def source_of(self, target: str) -> str | None:
        """The source name that fills our `target`, or None when the rule is not about it."""
        return _renamed(target, self.target, self.source)


def _renamed(name: str, template: str, other: str) -> str | None:
    """A name of one template under the other; None if it is not of the template."""
    match = _regex(template).fullmatch(name)
    if match is None:
        return None
    found = dict(zip(_PLACE.findall(template), match.groups(), strict=True))
    return _PLACE.sub(lambda place: found[place[1]], other)


@functools.cache
def _regex(template: str) -> re.Pattern[str]:
    """What a name of a template looks like, with a group for each place."""
    literals, places = _PLACE.split(template)[::2], _PLACE.findall(template)
    unknown = [place for place in places if "|" not in place and place not in _KINDS]
    if unknown or len(set(places)) < len(places) or any(set("{}") & set(t) for t in literals):
        raise ValueError(
            f"template {template!r}: a place is one of {', '.join(_KINDS)} or words as a|b, each "
            "once"
        )
    kinds = [_KINDS.get(p) or "|".join(map(re.escape, p.split("|"))) for p in places]
    groups = [f"({kind})" for kind in kinds]
    rest = zip(groups, literals[1:], strict=True)
    return re.compile(
        re.escape(literals[0]) + "".join(group + re.escape(literal) for group, literal in rest)
    )


class Ignored(NamedTuple):
    """A source tensor that is not converted, and why.

    Attributes:
      source: its name.
      reason: told to the user.
      same_as: source tensor that this one repeats (tied weights). When both are present their
        bytes must agree; when only this one is, it is read in the other's place.
    """

    source: str
    reason: str
    same_as: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of one stored tensor that go into the tensor being assembled."""

    source: str
    source_shape: Shape
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Map:
    """A total, invertible table of tensor names between one ecosystem and ours.

    Attributes:
      name: for messages, e.g. "diffusers FluxTransformer2DModel".
      rules: each source name matches exactly one.
      ignored: sources dropped with a reason.
      prefixes: optional name prefixes stripped from all sources (`model.diffusion_model.`).
      export_prefix: prefix of all names on the way back, where readers want one.
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()
    prefixes: tuple[str, ...] = ()
    export_prefix: str = ""

    def strip_prefix(self, source: str) -> str:
        """A stored name without the prefix that it may have."""
        for prefix in self.prefixes:
            if source.startswith(prefix):
                return source[len(prefix) :]
        return source

    def ignored_entry(self, source: str) -> Ignored | None:
        """Why a (prefix-free) source name is not converted; None if it is."""
        return next((entry for entry in self.ignored if entry.source == source), None)

    def target_of(self, source: str) -> tuple[str, Rule] | None:
        """Our name for a (prefix-free) source name and the one rule that says so.

        Raises:
          ValueError: two rules match (a mistake in the table, not in the input).
        """
        hits = [(target, rule) for rule in self.rules if (target := rule.target_of(source))]
        if len(hits) > 1:
            raise ValueError(
                f"{self.name}: {source!r} matches {len(hits)} rules: "
                f"{', '.join(repr(rule.source) for _, rule in hits)}; exactly one may"
            )
        return hits[0] if hits else None

    def sources_of(self, target: str, shape: Shape) -> tuple[Piece, ...]:
        """The pieces, in row order, that fill our `target` of `shape`.

        Raises:
          ValueError: no rule fills it, or the rules do not cover it exactly once.
        """
        hits: list[tuple[int, Piece]] = []
        counts = set()
        for rule in self.rules:
            source = rule.source_of(target)
            if source is None:
                continue
            index, count = rule.transform.share
            counts.add(count)
            source_shape = rule.transform.source_shape(shape)
            hits.append((index, Piece(source, source_shape, rule.transform.runs(shape))))
        if not hits:
            raise ValueError(f"{self.name}: no rule fills {target!r}")
        hits.sort(key=lambda hit: hit[0])
        if len(counts) != 1 or [index for index, _ in hits] != list(range(counts.pop())):
            raise ValueError(
                f"{self.name}: {target!r} is not covered exactly once: parts "
                f"{[index for index, _ in hits]} from {[piece.source for _, piece in hits]}"
            )
        return tuple(piece for _, piece in hits)
