"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file: whole or, if that fails or is stopped, it is as it was.

    A device or a pipe is written to in its place.

    Raises:
      OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    # A link stays one.
    target = Path(os.path.realpath(path))
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, target)
    # Ctrl-C and SIGTERM too.
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
