"""Parts of a page that a program writes: between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent


def replaced(text: str, name: str, content: str) -> str:
    """`text` with the block rewritten.

    Raises:
      ValueError: there is no such block, or more than one.
    """
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    new, count = block.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"the page has {count} blocks called {name}, expected one")
    return new


def writer(
    page: Path, name: str, render: Callable[[], str], command: str
) -> Callable[[bool], None]:
    """The command that rewrites one block of one page, or with `--check` tells that it is old."""

    def main(
        check: Annotated[
            bool, typer.Option("--check", help="Only say whether the page is current.")
        ] = False,
    ) -> None:
        before = page.read_text(encoding="utf-8")
        after = replaced(before, name, render())
        if check and before != after:
            raise SystemExit(f"error: {page.name} is out of date: run {command}")
        if before != after:
            page.write_text(after, encoding="utf-8")

    main.__doc__ = f"Writes the generated part of {page.name}."
    return main
