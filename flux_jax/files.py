"""Reading text, writing files whole, making folders: what fails is one line with the path."""

from __future__ import annotations

import contextlib
from pathlib import Path

from flux_jax.errors import UserError


def read_text(path: Path) -> str:
    """A UTF-8 text file, a byte-order mark left out, its lines ended by "\\n" alone.

    Raises:
      UserError: it is not there, is not UTF-8, or has zero bytes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    end = raw.find(b"\0")
    if end < 0:
        try:
            return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            end = error.start
    line = raw[:end].count(b"\n") + 1
    raise UserError(f"{path}, line {line}: is not UTF-8 text")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or, if the process is killed, as it was before.

    Raises:
      UserError: it cannot be written.
    """
    # One name for all times: what a killed process left is written over by the next.
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are not there.

    Raises:
      UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
