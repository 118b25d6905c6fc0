"""Errors a user can mend, and how the command lines show them."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class UserError(ValueError):
    """What was wrong with the caller's input: one line naming it, what was expected and found."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2, without a traceback.

    SIGTERM ends the block as an exception does, so that what was half-written is removed.
    """
    with _clean_termination():
        try:
            yield
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None


@contextlib.contextmanager
def _clean_termination() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    # Only the main thread may handle signals; a command that runs in another leaves them alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
