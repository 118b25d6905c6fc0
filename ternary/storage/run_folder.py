"""What the folders of runs that survive a kill have in common: one run at a time, whole files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from flux_jax.errors import UserError


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder for the length of the block, or of the process.

    Args:
      folder: of the run; it exists.

    Raises:
      UserError: another run is at work there.
    """
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some network disks lock no folders.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another run is at work here; wait for it") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(place: Path, kept: str = "") -> Iterator[None]:
    """A failed write in the block becomes one line.

    Args:
      place: the file or folder that the line names.
      kept: what is left, as "; finished parts are kept".

    Raises:
      UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror or error}{kept}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file, complete or not at all, and wait until the disk has it.

    Raises:
      OSError: it cannot be written; what was there is as before.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Characters that no encoding has, as of a broken file name, become question marks.
        with open(unfinished, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
