"""A run's state on disk: Orbax checkpoints, written while the training goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flux_jax.errors import UserError
from flux_jax.files import writing


class StateStore:
    """The checkpoints of one run.

    A checkpoint is complete or not there: Orbax writes beside its place and renames, and drops an
    old one only when a newer is complete. The arrays are copied before `save` returns, so that the
    training may overwrite them; writing goes on in the background.

    Args:
      folder: made if absent.
      keep: the latest so many are kept.
    """

    def __init__(self, folder: Path, *, keep: int):
        # Orbax reports every phase of every save at INFO.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        with writing(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to write the state of a step; waits for the write before it.

        Raises:
          UserError: the disk is full, now or in the write before.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.save(step, args=ocp.args.StandardSave(_named(state)))
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until all that was saved is on the disk.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

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
            named = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
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

    def close(self) -> None:
        """Wait for the last write, and let go of the folder."""
        self._manager.close()

    def _failed(self, error: Exception) -> UserError:
        reason = str(error).split("\n")[0][:200]
        return UserError(
            f"a checkpoint could not be written to {self.folder} ({reason}); "
            f"{self.describe_latest()}"
        )


def complete_steps(folder: Path) -> list[int]:
    """The steps of a folder's complete checkpoints; none where there is no such folder."""
    # One that is being written has a longer name.
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves in order, under names that sort in that order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
