"""The prompts of each step, from the host to the devices that need them.

All embeddings of a full-size run are 30 GB: too many for a device, and for the hosts of a small
run. So they stay on disk, and a step is given the rows of its own states. Which rows those are is
drawn on the device, in the trajectories. But it does not depend on what the models compute: a copy
of the pool, moved on without velocities, runs one step ahead and says. The host reads what it says
while the devices work on the step before; each process reads the rows of its own devices. Nothing
of this is in a checkpoint: the copy is made of the pool that was restored.

The table split over the devices would be less code, but takes from them what the training needs
most, and sends each row past every device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ternary.distillation.placement import batch_split
from ternary.distillation.step import PromptRows
from ternary.distillation.text_cache import TextTable
from ternary.distillation.trajectory import Pool, Trajectories


class PromptFeed:
    """Gives the rows of step after step.

    Args:
      table: the embeddings.
      trajectories: the rules of the pool.
      accumulate: groups of a step.
      mesh: the devices.
    """

    def __init__(self, table: TextTable, trajectories: Trajectories, accumulate: int, mesh: Mesh):
        self._table = table
        self._mesh = mesh
        self._ahead: tuple[Pool, Int[Array, "A B"]] | None = None
        self._batch = trajectories.batch_size
        groups = trajectories.config.groups

        def look(pool: Pool, step: Int[Array, ""]) -> tuple[Pool, Int[Array, "A B"]]:
            def one(pool: Pool, index: Int[Array, ""]) -> tuple[Pool, Int[Array, " B"]]:
                group = (step * accumulate + index) % groups
                still = jnp.zeros(pool.x.shape[1:], jnp.float32)
                return trajectories.advance(pool, group, still, still), pool.prompt[group]

            return jax.lax.scan(one, pool, jnp.arange(accumulate))

        self._look = look
        self._program: Any = None
        self._one = jax.jit(
            lambda prompt, group: jax.lax.dynamic_slice_in_dim(prompt, group, 1),
            out_shardings=batch_split((1, self._batch), mesh),
        )

    def begin(self, pool: Pool, step: int) -> None:
        """Start over: the next rows are those of step `step`, counted from 0, of this pool."""
        places = jax.tree.map(lambda leaf: batch_split(leaf.shape, self._mesh), pool)
        rows = batch_split((1, self._batch), self._mesh)
        # The pool itself is the training's: nothing is donated here the first time.
        first = jax.jit(self._look, out_shardings=(places, rows))
        self._program = jax.jit(self._look, donate_argnums=0, out_shardings=(places, rows))
        self._ahead = first(pool, np.int32(step))
        self._step = step

    def next(self) -> PromptRows:
        """The rows of the next step, (A, B, ...)."""
        assert self._ahead is not None, "begin comes first"
        pool, rows = self._ahead
        self._step += 1
        # Before the step itself is dispatched, so that the answer does not wait for it.
        self._ahead = self._program(pool, np.int32(self._step))
        return self._rows(rows)

    def group(self, pool: Pool, group: int) -> PromptRows:
        """The rows of one group of a pool, (B, ...)."""
        return PromptRows(*(field[0] for field in self._rows(self._one(pool.prompt, group))))

    def _rows(self, rows: Int[Array, "A B"]) -> PromptRows:
        # Devices that share their states share the rows: read once a process.
        read: dict[int, tuple[Any, ...]] = {}
        for shard in rows.addressable_shards:
            start = _start(shard.index)
            if start not in read:
                read[start] = self._table.take(np.asarray(shard.data))
        tokens, width, pooled = self._table.shape
        count = rows.shape[0]

        def placed(field: int, shape: tuple[int, ...]) -> jax.Array:
            return jax.make_array_from_callback(
                shape,
                batch_split(shape, self._mesh),
                lambda index: read[_start(index)][field],
            )

        return PromptRows(
            placed(0, (count, self._batch, tokens, width)), placed(1, (count, self._batch, pooled))
        )


def _start(index: Any) -> int:
    """The first state of a part; a part that is the whole does not say."""
    return index[1].start or 0
