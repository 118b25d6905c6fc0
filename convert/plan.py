"""What a conversion will do: which rows of which tensors make up each tensor to be written.

A plan is made from names and shapes alone, before any weight is read, and it is total: every source
is used once or left out with a reason, every target is filled once. After the converter of
jax-llm-examples and the rule tables of bonsai, in spirit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from convert.problems import refusal
from convert.rules import Map, Piece
from convert.transforms import Shape


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A tensor to be written and the pieces it is made of. Pieces cover each row exactly once."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """What a conversion will do: the tensors to write, and what is left out.

    Attributes:
      assemblies: one for each tensor to be written, in the order of the targets.
      dropped: `(source, reason)` of each ignored tensor.
      ties: `(source, other source)` pairs whose bytes must agree.
    """

    assemblies: tuple[Assembly, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    ties: tuple[tuple[str, str], ...] = ()


def forward_plan(
    table: Map, sources: Mapping[str, Shape], targets: Mapping[str, Shape], *, what: str
) -> TensorPlan:
    """Plan the conversion of `sources` (another ecosystem's) into `targets` (ours).

    Args:
      table: the name map.
      sources: shapes of the stored tensors by their stored names.
      targets: shapes of every parameter of our model by dotted path.
      what: what is being converted, for the message (component and file).

    Returns:
      The plan; pieces carry stored names (prefix included).

    Raises:
      UserError: leftover, missing, doubled or misshapen tensors, all in one report.
      ValueError: the table itself does not fit our model.
    """
    problems: list[str] = []
    stored = _without_prefixes(table, sources, problems)
    dropped, ties = _set_aside(table, stored)
    assemblies, used = [], set()
    for target, shape in targets.items():
        try:
            wanted = table.sources_of(target, shape)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        used |= {piece.source for piece in wanted}
        found = _stored_pieces(wanted, stored, sources, problems)
        assemblies.append(Assembly(target, shape, found))
    problems += [
        f"tensor `{name}` of shape {list(sources[name])} is not expected"
        + _why_unexpected(table, bare)
        for bare, name in stored.items()
        if bare not in used
    ]
    if problems:
        raise refusal(what, problems)
    return TensorPlan(tuple(assemblies), tuple(dropped), tuple(ties))


def _without_prefixes(
    table: Map, sources: Mapping[str, Shape], problems: list[str]
) -> dict[str, str]:
    """Stored names by their names without prefix; adds to the problems what is there twice."""
    stored: dict[str, str] = {}
    for name in sources:
        bare = table.strip_prefix(name)
        if bare in stored:
            problems.append(f"tensors `{stored[bare]}` and `{name}` are the same one twice")
        stored[bare] = name
    return stored


def _set_aside(
    table: Map, stored: dict[str, str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Takes what is ignored out of `stored`; returns `TensorPlan.dropped` and `TensorPlan.ties`.

    A tensor that repeats another which is not there takes its place.
    """
    dropped, ties = [], []
    for bare in list(stored):
        entry = table.ignored_entry(bare)
        if entry is None:
            continue
        name = stored.pop(bare)
        if entry.same_as is not None and entry.same_as not in stored:
            stored[entry.same_as] = name
            continue
        dropped.append((name, entry.reason))
        if entry.same_as is not None:
            ties.append((name, stored[entry.same_as]))
    return dropped, ties


def _stored_pieces(
    wanted: tuple[Piece, ...],
    stored: Mapping[str, str],
    sources: Mapping[str, Shape],
    problems: list[str],
) -> tuple[Piece, ...]:
    """The pieces under their stored names; adds to the problems what is missing or misshapen."""
    pieces = []
    for piece in wanted:
        if piece.source not in stored:
            problems.append(
                f"tensor `{piece.source}` is missing, expected shape {list(piece.source_shape)}"
            )
            continue
        name = stored[piece.source]
        found = tuple(sources[name])
        if found != piece.source_shape:
            problems.append(
                f"tensor `{piece.source}` has shape {list(found)}, "
                f"expected {list(piece.source_shape)}"
            )
        pieces.append(dataclasses.replace(piece, source=name))
    return tuple(pieces)


def _why_unexpected(table: Map, bare: str) -> str:
    """What the map knows of a tensor that the model does not want."""
    hit = table.target_of(bare)
    if hit is None:
        return f" (no rule of the map {table.name} is about it)"
    return f" (it would be `{hit[0]}`, which the model of this config does not have)"


def backward_plan(table: Map, targets: Mapping[str, Shape]) -> TensorPlan:
    """Plan the export of our `targets` under the names of the map's ecosystem.

    Args:
      table: the name map.
      targets: shapes of every parameter of our model by dotted path.

    Returns:
      Assemblies are the other ecosystem's tensors, their pieces rows of our arrays.

    Raises:
      ValueError: the table does not cover our model, or names a tensor twice.
    """
    assemblies: dict[str, Assembly] = {}
    for target, shape in targets.items():
        for piece in table.sources_of(target, shape):
            hit = table.target_of(piece.source)
            if hit is None or hit[0] != target:
                raise ValueError(
                    f"{table.name}: {target!r} -> {piece.source!r} does not lead back "
                    f"(found {hit[0] if hit else None!r})"
                )
            runs = tuple(run.swapped() for run in piece.runs)
            name = table.export_prefix + piece.source
            assemblies[piece.source] = Assembly(
                name, piece.source_shape, (Piece(target, shape, runs),)
            )
    return TensorPlan(tuple(assemblies.values()))
