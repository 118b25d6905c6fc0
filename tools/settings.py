"""Writes the settings of a distillation, with their defaults, into docs/distillation.md.

    python -m tools.settings          # rewrite
    python -m tools.settings --check  # exit code 1 if it is out of date

What a setting is stands in the docstring of its config, under "Attributes:".
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

from ternary.distillation.run_config import RunConfig
from tools import blocks

PAGE = blocks.ROOT / "docs" / "distillation.md"


def render() -> str:
    """A table of every setting."""
    lines = ["| setting | default | what |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {default} | {what} |" for name, default, what in _rows(RunConfig, "")]
    return "\n".join(lines)


def _rows(kind: type, where: str) -> Iterator[tuple[str, str, str]]:
    """Of a config and those within it, in the order of their fields."""
    told = attributes(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            yield from _rows(type(field.default), f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}", _default(field.default), told[field.name]


def attributes(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each attribute; several may share an entry."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    told: dict[str, str] = {}
    for entry in re.split(r"^  (?=\S)", text, flags=re.M)[1:]:
        names, _, what = " ".join(entry.split()).partition(": ")
        told |= dict.fromkeys(names.split(", "), what.replace("|", "\\|"))
    return told


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    typer.run(blocks.writer(PAGE, "settings", render, "python -m tools.settings"))
