"""A target that is there complete or not at all.

Everything is written beside the target, in `NAME.partial-XXXXXXXX`, and renamed when it is whole.
A killed run leaves such a folder behind; the next run to the same target removes it. A lock in the
folder tells a dead run from one that is still writing, and from a folder of the user's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from flux_jax.errors import UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK = ".lock"


@contextlib.contextmanager
def staged(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A fresh folder beside `target`, whose entry `target.name` becomes the target at the end.

    Args:
      target: file or folder to be made.
      force: replace what is there, once the new one is whole.
      replaceable: whether `force` may replace what is there; it protects folders of another kind.

    Yields:
      The path to write to; the caller creates a file or a folder there.

    Raises:
      UserError: the target exists (and is not to be replaced), its parent cannot be written to,
        another run is writing to it, or the disk is full. Nothing is left behind.
    """
    target = Path(os.path.abspath(target))
    check_target(target, force=force, replaceable=replaceable)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        stage = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    lock = None
    try:
        lock = os.open(stage / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        # Some network disks lock nothing.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield stage / target.name
        _on_disk(stage / target.name)
        _put_in_place(stage / target.name, target, force=force)
    except OSError as error:
        raise explain(error, target) from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Whether `staged` may write to `target`.

    Raises:
      UserError: it exists and is not to be replaced, or is a mount point, which cannot be.
    """
    if not target.exists() and not target.is_symlink():
        return
    if os.path.ismount(target):
        raise UserError(
            f"{target}: is a mount point, in whose place nothing can be put; give a folder in it"
        )
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"{target}: exists already; --force replaces it (in Python, force=True)")
    if target.is_symlink() or not replaceable(target):
        raise UserError(
            f"{target}: exists and is no checkpoint that --force would replace, or has other files "
            "in it; remove it yourself"
        )


def explain(error: OSError, target: Path) -> UserError:
    """A failed write as one line."""
    where = error.filename or target
    if error.errno in _FULL:
        return UserError(f"{target}: disk full while writing ({error.strerror}); nothing was kept")
    return UserError(f"{where}: cannot be written: {error.strerror or error}")


def _remove_stale(target: Path) -> None:
    """Remove what dead runs to the same target left.

    Raises:
      UserError: one of them is alive.
    """
    for stage in target.parent.glob(f"{_escape(target.name)}.partial-????????"):
        try:
            lock = os.open(stage / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            # Killed before it had one; or somebody's `model.partial-training`.
            with contextlib.suppress(OSError):
                stage.rmdir()
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target}: another conversion is writing to it, in {stage}") from None
        except OSError:
            pass  # without locks a dead run cannot be told from one that is alive
        else:
            shutil.rmtree(stage)
        finally:
            os.close(lock)


def _escape(name: str) -> str:
    """A name as a glob pattern for itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _on_disk(made: Path) -> None:
    """Everything that was made, files and folders, before it gets its name."""
    for path in [made, *made.rglob("*")]:
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks and shared folders do that for no folder.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _put_in_place(made: Path, target: Path, *, force: bool) -> None:
    """Rename, or exchange with what is there; the old one is left in the stage, to be removed."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        made.rename(target)
    elif not force:
        raise UserError(
            f"{target}: appeared during the conversion; --force replaces it (in Python, force=True)"
        )
    elif not _exchange(made, target):
        # No atomic exchange on this system. A run killed between these lines leaves the old one
        # under its new name, which no later run removes.
        old = made.parent.with_name(made.parent.name.replace(".partial-", ".old-"))
        target.rename(old)
        made.rename(target)
        remove(old)
    _sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux). False where the system or the disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0
