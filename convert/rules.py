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

_GROUP = re.compile(r"\(([^()]*)\)")
_BACKREFERENCE = re.compile(r"\\(\d)")
_METACHARACTERS = set(".^$*+?{}[]|()\\")


def _literal(pattern: str, whole: str) -> str:
    """Undo the escapes of a pattern's literal stretch; refuse anything that is not literal."""
    text, i = [], 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\" and i + 1 < len(pattern) and not pattern[i + 1].isalnum():
            i += 1
            char = pattern[i]
        elif char in _METACHARACTERS:
            raise ValueError(
                f"rule pattern {whole!r} cannot be inverted: {char!r} outside a capture group; "
                "write escaped literals and simple capture groups only"
            )
        text.append(char)
        i += 1
    return "".join(text)


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""One line of a map: sources that fullmatch `pattern` fill `target` through `transform`.

    Attributes:
      pattern: regular expression on the source name, restricted so that it can be inverted:
        literal text with escapes (`\.`) and capture groups without nesting (`(\d+)`,
        `(weight|bias)`).
      target: our name; `\1`... stand for the groups, each used at least once.
      transform: placement of the source's rows in the target.
    """

    pattern: str
    target: str
    transform: Transform = IDENTITY

    def __post_init__(self):
        # Both compiled forms are built now, so that a table with a mistake fails where it is made.
        for built in (self._source_parts, self._source_regex, self._target_regex):
            del built

    @functools.cached_property
    def _groups(self) -> list[str]:
        return [m.group(1) for m in _GROUP.finditer(self.pattern)]

    @functools.cached_property
    def _source_regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    @functools.cached_property
    def _source_parts(self) -> list[str]:
        """Literal stretches of the pattern, one more than it has groups."""
        return [_literal(part, self.pattern) for part in _GROUP.split(self.pattern)[::2]]

    @functools.cached_property
    def _target_regex(self) -> re.Pattern[str]:
        seen: set[int] = set()
        out = []
        for i, piece in enumerate(_BACKREFERENCE.split(self.target)):
            if i % 2 == 0:
                out.append(re.escape(piece))
                continue
            number = int(piece)
            if not 1 <= number <= len(self._groups):
                raise ValueError(
                    f"target {self.target!r} uses \\{number}, pattern {self.pattern!r} "
                    f"has {len(self._groups)} groups"
                )
            if number in seen:
                out.append(f"(?P=g{number})")
            else:
                out.append(f"(?P<g{number}>{self._groups[number - 1]})")
            seen.add(number)
        if len(seen) != len(self._groups):
            raise ValueError(
                f"rule {self.pattern!r} -> {self.target!r} cannot be inverted: every group of the "
                "pattern must be used in the target"
            )
        return re.compile("".join(out))

    def target_of(self, source: str) -> str | None:
        """Our name for `source`, or None when the rule is not about it."""
        match = self._source_regex.fullmatch(source)
        if match is None:
            return None
        return _BACKREFERENCE.sub(lambda ref: match.group(int(ref.group(1))), self.target)

    def source_of(self, target: str) -> str | None:
        """The source name that fills our `target`, or None when the rule is not about it."""
        match = self._target_regex.fullmatch(target)
        if match is None:
            return None
        out = [self._source_parts[0]]
        for number, part in enumerate(self._source_parts[1:], start=1):
            out += [match.group(f"g{number}"), part]
        return "".join(out)


class Ignored(NamedTuple):
    """A source tensor that is not converted, and why.

    Attributes:
      pattern: regular expression, fullmatched on the source name.
      reason: told to the user.
      same_as: source tensor that this one repeats (tied weights). When both are present their
        bytes must agree; when only this one is, it is read in the other's place.
    """

    pattern: str
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
        for entry in self.ignored:
            if re.fullmatch(entry.pattern, source):
                return entry
        return None

    def target_of(self, source: str) -> tuple[str, Rule] | None:
        """Our name for a (prefix-free) source name and the one rule that says so.

        Raises:
          ValueError: two rules match (a mistake in the table, not in the input).
        """
        hits = [(target, rule) for rule in self.rules if (target := rule.target_of(source))]
        if len(hits) > 1:
            raise ValueError(
                f"{self.name}: {source!r} matches {len(hits)} rules: "
                f"{', '.join(repr(rule.pattern) for _, rule in hits)}; exactly one may"
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
