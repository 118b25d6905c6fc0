"""Small JSON files, and writing large ones without filling the system's page cache."""

from __future__ import annotations

import os
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.json_values import parse_json

MAX_JSON_BYTES = 50_000_000


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
      UserError: the file is absent, too large or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES} bytes, this is no config file")
        content = parse_json(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_all(fd: int, data: bytes | memoryview) -> int:
    """Write all of `data`; returns its length."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def finish(fd: int) -> None:
    """Wait until what was written to a file is on the disk, then drop its pages."""
    os.fsync(fd)
    forget(fd)


def forget(fd: int, offset: int = 0, length: int = 0) -> None:
    """Drop a range of a file (or all of it) from the system's page cache, where that can be."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
