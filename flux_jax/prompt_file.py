"""Files of prompts, one a line."""

from __future__ import annotations

from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.files import read_text


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
      UserError: the file is absent, is not text, or holds no prompt.
    """
    # Not `splitlines`: it also splits at characters that stand within captions, as U+2028.
    prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; it must hold one prompt a line")
    return prompts
