"""A run's state on disk: Orbax checkpoints, written while the training goes on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from flux_jax.errors import UserError
from flux_jax.files import writing

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds. SLURM kills a job 30 s after it has told it to stop.
PATIENCE = 20.0


class StateStore:
    """The checkpoints of one run.

    A checkpoint is complete or not there: Orbax writes beside its place and renames, and drops an
    old one only when a newer is complete. The arrays are copied before `save` returns, so that the
    training may overwrite them; writing goes on in the background.

    Orbax is called from a thread of its own: what a signal raises in the main thread would leave
    half of a call at work, and the interpreter does not wait for a daemon's threads.

    Args:
      folder: made if absent.
      keep: the latest so many are kept.
    """

    def __init__(self, folder: Path, *, keep: int):
        self._call: threading.Thread | None = None
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._reports = _Reports()
        try:
            with writing(self.folder):
                self._manager = ocp.CheckpointManager(self.folder, options=options)
        except BaseException:
            self._reports.close()
            raise

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to write the state of a step; waits for the write before it.

        Raises:
          UserError: the disk is full, now or in the write before.
        """

        def save() -> None:
            self._manager.wait_until_finished()
            self._manager.save(step, args=ocp.args.StandardSave(_named(state)))

        self._write(save)

    def wait(self) -> None:
        """Until all that was saved is on the disk.

        Raises:
          UserError: it cannot be written.
        """
        self._write(self._manager.wait_until_finished)

    def restore(self, like: Any) -> Any:
        """The latest state.

        Args:
          like: arrays or shapes of the same structure; their shardings say where it goes.

        Raises:
          UserError: a checkpoint that is damaged or of another structure.
        """
        step = self.latest
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like)
        )
        try:
            named = self._apart(
                lambda: self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            )
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"cannot restore step {step} of {self.folder}: {reason}; delete "
                f"{self.folder / str(step)} to go on from the one before, or use another folder"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in sorted(named)])

    def describe_latest(self) -> str:
        """Where a run would go on, in words."""
        # The manager may count a write that has just failed; the folder does not.
        steps = complete_steps(self.folder)
        if not steps:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is step {max(steps)}, {self.folder / str(max(steps))}"

    def close(self, patience: float | None = None) -> None:
        """Wait for the last write, and let go of the folder.

        Args:
          patience: seconds after which the write is given up; None to wait for its end.
        """
        end = None if patience is None else time.monotonic() + patience

        def left() -> float | None:
            return None if end is None else max(0.0, end - time.monotonic())

        if self._call is not None:
            self._call.join(left())
        if self._call is None or not self._call.is_alive():
            # A write that has failed was reported by `save` or `wait`.
            with contextlib.suppress(Exception):
                self._apart(self._manager.close, left())
        self._reports.close()

    def _write(self, call: Callable[[], None]) -> None:
        """A call into Orbax that writes, or waits for what is being written.

        Raises:
          UserError: the system refuses the write.
        """
        try:
            self._apart(call)
        except Exception as error:
            if jax.process_count() > 1 and _system_says(error) is None:
                # Another process is gone, which `flux_jax.processes` reports.
                raise
            raise self._failed(error) from error

    def _apart(self, call: Callable[[], T], patience: float | None = None) -> T:
        """What a call into Orbax returns or raises; a signal ends the waiting, not the call.

        Raises:
          TimeoutError: it has not ended after `patience` seconds.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._call = threading.Thread(target=run, name="checkpoints", daemon=True)
        self._call.start()
        return future.result(patience)

    def _failed(self, error: Exception) -> UserError:
        # Another process may still be writing; the next start removes what is left.
        if jax.process_count() == 1:
            self._reports.settle()
            for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
        return UserError(
            f"a checkpoint could not be written to {self.folder} ({_reason(error)}); "
            f"{self.describe_latest()}"
        )


class _Reports:
    """Keeps what Orbax and TensorStore report of a failed write off stderr, unless --verbose.

    The failure is also raised, and that becomes the one line that a user sees.
    """

    def __init__(self):
        self._verbose = logger.isEnabledFor(logging.DEBUG)
        self._last = 0.0
        self._before = sys.unraisablehook
        # A bound method is a new object each time; `close` has to know this one again.
        self._hook = self._told
        sys.unraisablehook = self._hook
        # Orbax reports every phase of every save at INFO.
        absl = logging.getLogger("absl")
        self._level = absl.level
        absl.setLevel(logging.WARNING if self._verbose else logging.CRITICAL)
        if not self._verbose:
            # Stays: asyncio may report a failed task as late as when the interpreter ends.
            logging.getLogger("asyncio").addFilter(_is_no_lost_task)

    def settle(self, patience: float = 10.0) -> None:
        """Wait for writes that had begun when another failed: they would make folders again."""
        self._last = time.monotonic()
        end = self._last + patience
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                # Their own `join` raises what they have raised.
                threading.Thread.join(thread, max(0.0, end - time.monotonic()))
        while time.monotonic() < min(end, self._last + 0.3):
            time.sleep(0.05)

    def close(self) -> None:
        """Report as before."""
        logging.getLogger("absl").setLevel(self._level)
        if sys.unraisablehook is self._hook:
            sys.unraisablehook = self._before

    def _told(self, dropped: Any) -> None:
        # The first failure closes Orbax's event loop, where every other write reports its end.
        late = dropped.exc_type is RuntimeError and str(dropped.exc_value) == "Event loop is closed"
        if late:
            self._last = time.monotonic()
        if self._verbose or not late:
            self._before(dropped)


def _is_no_lost_task(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Task exception was never retrieved")


def _reason(error: Exception) -> str:
    """Why a write failed, in the system's words if it is the system that refused."""
    return _system_says(error) or str(error).split("\n")[0][:200]


def _system_says(error: Exception) -> str | None:
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        return os.strerror(int(found[1]))
    # A lost connection is an OSError too, but not the disk's.
    lost = isinstance(error, ConnectionError | TimeoutError)
    return error.strerror if isinstance(error, OSError) and not lost else None


def complete_steps(folder: Path) -> list[int]:
    """The steps of a folder's complete checkpoints; none where there is no such folder."""
    # One that is being written has a longer name.
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves in order, under names that sort in that order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
