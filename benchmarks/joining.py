"""Result files of several runs of one benchmark, made one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common import Figure, Peer, Result, read_result
from flux_jax.errors import UserError

# In the note of a figure of another commit than its file's.
_AT = re.compile(r"(?:^|, )at (\S+)$")


def joined(paths: list[Path], *, mixed: bool = False) -> Result:
    """All figures and peers of some result files; of a name that several have, the last one's.

    Args:
      paths: the result files; the date, hardware, commit and versions are the first's.
      mixed: whether commits may differ; what was found at another one then says so in its note.

    Raises:
      UserError: runs of other benchmarks or devices, or of other commits unless `mixed`.
    """
    results = [read_result(path) for path in paths]
    first = results[0]
    figures: dict[str, Figure] = {}
    peers: dict[str, Peer] = {}
    for path, result in zip(paths, results, strict=True):
        for field in ("benchmark", "device", *(() if mixed else ("commit",))):
            mine, other = getattr(first, field), getattr(result, field)
            if mine != other:
                raise UserError(f"{path}: {field} is {other}, not {mine} as before")
        at = "" if result.commit == first.commit else at_commit(result.commit)
        figures |= _noted(result.figures, at)
        peers |= {
            name: dataclasses.replace(peer, figures=_noted(peer.figures, at))
            for name, peer in result.peers.items()
        }
    commands = " and ".join(dict.fromkeys(result.command for result in results))
    return dataclasses.replace(first, figures=figures, peers=peers, command=commands)


def _noted(figures: Mapping[str, Figure], note: str) -> dict[str, Figure]:
    """Figures, with more in their notes."""
    return {name: noted(figure, note) for name, figure in figures.items()}


def at_commit(commit: str) -> str:
    """What is noted at a figure of another commit."""
    return f"at {commit[:12]}"


def noted_commit(figure: Figure) -> str | None:
    """The commit that a figure's note names; None for that of its file."""
    match = _AT.search(figure.note)
    return match and match.group(1)


def noted(figure: Figure, note: str) -> Figure:
    """A figure with more in its note."""
    return dataclasses.replace(figure, note=", ".join(filter(None, (figure.note, note))))
