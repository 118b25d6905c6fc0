"""Errors a user can mend, and how the command lines show them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

FAILED, BAD_INPUT = 1, 2


class UserError(ValueError):
    """What was wrong with the caller's input: one line naming it, what was expected and found."""


@contextlib.contextmanager
def exit_on_user_error(*, verbose: bool = False) -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and an exit code, without a traceback.

    A `UserError` ends with code 2, and so do a file that may not be opened and a full disk; a
    device whose memory is full with 1. SIGTERM ends the block as an exception does, so that what
    was half-written is removed; neither it nor an interrupt is lost where Python drops exceptions.

    Args:
      verbose: the traceback stands above the line.
    """
    with _clean_termination():
        try:
            yield
        except UserError as error:
            show_error(str(error), verbose=verbose)
            raise SystemExit(BAD_INPUT) from None
        except OSError as error:
            told = _of_the_system(error)
            if told is None:
                raise
            show_error(told, verbose=verbose)
            raise SystemExit(BAD_INPUT) from None
        except RuntimeError as error:
            if not _memory_is_full(error):
                raise
            first = str(error).partition("\n")[0]
            told = f"the device's memory is full: {first} (docs/troubleshooting.md)"
            show_error(told, verbose=verbose)
            raise SystemExit(FAILED) from None


def show_error(message: str, *, verbose: bool = False) -> None:
    """One line on stderr, whatever lines the message has.

    Args:
      message: what is wrong.
      verbose: the traceback of the exception at hand stands above it.
    """
    if verbose:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _of_the_system(error: OSError) -> str | None:
    """What the user can mend of it, told; None if it may be a bug."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # It names no file where one is open already, as stdout is.
        named = "a file, or what is printed" if error.filename is None else error.filename
        return f"{named}: cannot be written: {error.strerror}"
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename}: cannot be opened: {error.strerror}"
    return None


def _memory_is_full(error: RuntimeError) -> bool:
    """JAX has no exception of its own for it; its module is not imported here for its name."""
    of_jax = type(error).__module__.partition(".")[0] in ("jax", "jaxlib")
    message = str(error)
    # A CPU's is INTERNAL.
    return of_jax and (message.startswith("RESOURCE_EXHAUSTED") or "Out of memory" in message)


class _Terminated(SystemExit):
    """What SIGTERM raises."""


@contextlib.contextmanager
def _clean_termination() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        del frame
        raise _Terminated(128 + number)

    def send_again(dropped: Any) -> None:
        # A signal is handled wherever the main thread is: in a destructor or in a callback of the
        # garbage collector (JAX has one), what the handler raises goes no further.
        kinds = {_Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
        number = kinds.get(dropped.exc_type)
        if number is None:
            hook_before(dropped)
            return
        timer = threading.Timer(0.01, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    # Only the main thread may handle signals; a command that runs in another leaves them alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook_before = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGTERM, before)
