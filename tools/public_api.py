"""Writes the public names and their signatures into docs/api.md.

    python -m tools.public_api          # rewrite
    python -m tools.public_api --check  # exit code 1 if it is out of date

A public name is one in the `__all__` of a package. A change of the page is a change of the API.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import textwrap
from typing import Any

import typer

from pallas_kernels.command_line import PACKAGES
from tools import blocks

PAGE = blocks.ROOT / "docs" / "api.md"
WIDTH = 100


def render() -> str:
    """A section for each package."""
    lines: list[str] = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        lines += [f"## {package}", "", "```python"]
        for name in sorted(module.__all__):
            lines += map(_wrapped, _entry(name, getattr(module, name)))
        lines += ["```", ""]
    return "\n".join(lines).rstrip()


def _wrapped(line: str) -> str:
    """A long signature over several lines."""
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return "\n".join(
        textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        if len(line) > WIDTH
        else [line]
    )


def _entry(name: str, thing: Any) -> list[str]:
    if inspect.isclass(thing):
        return _class(name, thing)
    if callable(thing):
        return [f"{name}{_signature(thing)}"]
    return [f"{name} = {thing!r}"]


def _class(name: str, kind: type) -> list[str]:
    """A class: how it is made, its fields, properties and methods, those of its own only."""
    if issubclass(kind, Exception):
        return [f"class {name}({kind.__base__.__name__})"]  # pyright: ignore[reportOptionalMemberAccess]
    lines = [f"class {name}{_signature(kind)}"]
    fields = (
        {field.name for field in dataclasses.fields(kind)}
        if dataclasses.is_dataclass(kind)
        else set()
    )
    for member, value in vars(kind).items():
        if member in fields or (member.startswith("_") and member != "__call__"):
            continue
        if isinstance(value, property):
            lines.append(f"    {member}: property")
        elif isinstance(value, classmethod | staticmethod):
            lines.append(f"    {member}{_signature(getattr(kind, member))}")
        elif inspect.isfunction(value):
            lines.append(f"    {member}{_signature(value)}")
    return lines


def _signature(thing: Any) -> str:
    """The parameters with their defaults; annotations are the reference's."""
    made = inspect.isclass(thing) and not dataclasses.is_dataclass(thing)
    # Of an nnx module, whose metaclass hides the constructor's own.
    signature = inspect.signature(thing.__init__ if made else thing)
    parameters = list(signature.parameters.values())[made:]
    bare = [p.replace(annotation=p.empty, default=_default(p.default)) for p in parameters]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _default(value: Any) -> Any:
    """A type or function by its name alone: the rest differs between versions and runs."""
    named = isinstance(value, type) or inspect.isfunction(value)
    return _Named(value.__name__) if named and value is not _EMPTY else value


class _Named(str):
    """A default that is shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


_EMPTY = inspect.Parameter.empty


if __name__ == "__main__":
    typer.run(blocks.writer(PAGE, "api", render, "python -m tools.public_api"))
