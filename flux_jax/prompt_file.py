"""Files of prompts, one a line."""

from __future__ import annotations

from pathlib import Path

from flux_jax.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
      UserError: the file is absent, is not text, or holds no prompt.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt file {path} is not UTF-8 text (byte {error.start}); "
            f"it must hold one prompt a line"
        ) from None
    if "\x00" in text:
        raise UserError(f"the prompt file {path} is not text: it has zero bytes")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; it must hold one prompt a line")
    return prompts
