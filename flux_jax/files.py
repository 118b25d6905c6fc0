"""Text read, files written whole, folders for one run at a time: a failure is one line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
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


# What `write_whole` names a file first: the process, and digits of the write's own. Earlier
# versions put no digits, or no process either.
_PARTIAL = re.compile(r"\.(.+)\.partial(?:-(\d+)(-[0-9a-f]{8})?)?")
# Names of those that this process is writing.
_under_way: set[str] = set()


def partial_paths(path: Path) -> set[Path]:
    """Parts of a file that are there, of processes that were killed or write it now."""
    matches = ((file, _PARTIAL.fullmatch(file.name)) for file in path.parent.iterdir())
    return {file for file, match in matches if match is not None and match[1] == path.name}


def clear_partials(folder: Path) -> None:
    """Remove what killed processes left of writing files.

    Args:
      folder: of the files; `claimed`, so that no other machine's run is writing there.
    """
    for file in folder.iterdir():
        partial = _PARTIAL.fullmatch(file.name)
        if partial is None or not partial[2]:
            continue
        # In a container each run has the same number: ours does not mean that it is ours.
        ours = int(partial[2]) == os.getpid() and partial[3] is not None
        if file.name not in _under_way if ours else not _is_alive(int(partial[2])):
            with contextlib.suppress(OSError):
                file.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # Another user's.
        pass
    return True


def write_whole(path: Path, content: bytes, kept: str = "") -> None:
    """Write a file and wait until the disk has it: whole or, if it fails or is killed, as before.

    Of several threads, processes or hosts that write it at a time, one's is there in the end.

    Args:
      path: its folder exists.
      content: all of it.
      kept: as in `writing`.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    _under_way.add(partial.name)
    with writing(path, kept):
        try:
            with open(partial, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            # An interrupt leaves nothing either.
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        finally:
            _under_way.discard(partial.name)


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    # Some network disks do that for no folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are not there.

    Raises:
      UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
