"""What is wrong with an input, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from flux_jax.errors import UserError

MAX_SHOWN = 6


def refusal(what: str | Path, problems: Sequence[str]) -> UserError:
    """One line that counts the problems and names the first.

    Args:
      what: is wrong: a file, or a component and its file.
      problems: one or more.
    """
    shown = "; ".join(problems[:MAX_SHOWN])
    more = len(problems) - MAX_SHOWN
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return UserError(f"{what}: {count}: {shown}" + (f"; and {more} more" if more > 0 else ""))


def first_line(error: BaseException) -> str:
    """The first line of the text of another library's error, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Puts `what` (a file) before a `UserError` of the block, which knows only what is in it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
