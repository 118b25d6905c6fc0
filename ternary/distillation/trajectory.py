"""States for self-distillation without images: trajectories that the training itself advances.

A pool holds many half-drawn pictures, each somewhere on its way from noise to image. A training
step takes a group of them, compares the student's velocity with the teacher's there, and lets each
take its next Euler step: along the teacher's velocity, which the loss needed anyway, or, on
policy, along the student's, so that the student's own errors are seen and corrected. A finished
picture makes room for new noise and another prompt. No pass is spent on making data, but for those
that once spread a new pool over all times.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flux_jax.configs import SchedulerConfig
from flux_jax.scheduler import make_schedule
from ternary.config import TrajectoryConfig

# 2**32 over the golden ratio: multiples of it, modulo 2**32, leave no large gap however many follow
# each other, and never fall into step with a length.
_GOLDEN = np.uint32(2654435769)


class Pool(NamedTuple):
    """Trajectories under way: G groups of B.

    Attributes:
      x: (G, B, I, P) float32 image tokens.
      position: (G, B) Euler steps taken.
      schedule: (G, B) which of `sampling_steps`.
      prompt: (G, B) row of the prompt set.
      guidance: (G, B) scale.
      on_policy: (G, B) whether the student leads.
      started: (G, B) trajectories begun in this place.
      place: (G, B) the number of the place. With it, `started` and `seed`, the random draws of a
        trajectory are determined, however the pool is split over devices.
      seed: (G, B) the same everywhere.
    """

    x: Float[Array, "G B I P"]
    position: Int[Array, "G B"]
    schedule: Int[Array, "G B"]
    prompt: Int[Array, "G B"]
    guidance: Float[Array, "G B"]
    on_policy: Bool[Array, "G B"]
    started: Int[Array, "G B"]
    place: Int[Array, "G B"]
    seed: Int[Array, "G B"]


class States(NamedTuple):
    """A batch of states to compare student and teacher at."""

    x: Float[Array, "B I P"]
    sigma: Float[Array, " B"]
    sigma_next: Float[Array, " B"]
    prompt: Int[Array, " B"]
    guidance: Float[Array, " B"]


class Trajectories:
    """The rules by which a pool is filled and advanced. Pure functions of the pool.

    Args:
      config: where states come from.
      scheduler: the model's noise schedule.
      tokens: (image tokens, channels of a token).
      batch_size: trajectories of a group.
      prompts: size of the prompt set.
    """

    def __init__(
        self,
        config: TrajectoryConfig,
        scheduler: SchedulerConfig,
        *,
        tokens: tuple[int, int],
        batch_size: int,
        prompts: int,
    ):
        self.config = config
        self.tokens = tokens
        self.batch_size = batch_size
        self.prompts = prompts
        longest = max(config.sampling_steps)
        table = np.zeros((len(config.sampling_steps), longest + 1), np.float32)
        for row, steps in enumerate(config.sampling_steps):
            table[row, : steps + 1] = make_schedule(scheduler, steps, tokens[0]).sigmas
        self.sigmas = jnp.asarray(table)
        self.lengths = jnp.asarray(config.sampling_steps, jnp.int32)

    def _begin(
        self, seed: Int[Array, ""], place: Int[Array, ""], started: Int[Array, ""]
    ) -> tuple[Array, ...]:
        """A new trajectory for one place: x, schedule, prompt, guidance, on_policy."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), place), started)
        keys = jax.random.split(key, 5)
        low, high = self.config.guidance
        return (
            jax.random.normal(keys[0], self.tokens, jnp.float32),
            jax.random.randint(keys[1], (), 0, len(self.config.sampling_steps)),
            jax.random.randint(keys[2], (), 0, self.prompts),
            jax.random.uniform(keys[3], (), minval=low, maxval=high),
            jax.random.bernoulli(keys[4], self.config.on_policy),
        )

    def start(self, seed: int | Int[Array, ""]) -> Pool:
        """A pool of fresh noise.

        Args:
          seed: of every draw, now and later.
        """
        shape = (self.config.groups, self.batch_size)
        places = jnp.arange(shape[0] * shape[1]).reshape(shape)
        seeds = jnp.full(shape, seed, jnp.int32)
        # Arrays of their own: a step that is given its state to overwrite takes none twice.
        position, started = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
        begin = jax.vmap(jax.vmap(self._begin))
        x, schedule, prompt, guidance, on_policy = begin(seeds, places, started)
        return Pool(x, position, schedule, prompt, guidance, on_policy, started, places, seeds)

    def stagger(self, pool: Pool) -> Int[Array, "G B"]:
        """How far to lead each trajectory before training, so that all times are met at once.

        Any run of neighbours, so every group and every device's part of one, is spread evenly over
        the whole of its trajectories.
        """
        # In whole numbers: the same on every device, and below the length for certain.
        share = (pool.place.astype(jnp.uint32) * _GOLDEN) >> 16
        lengths = self.lengths[pool.schedule].astype(jnp.uint32)
        return ((share * lengths) >> 16).astype(jnp.int32)

    def states(self, pool: Pool, group: Int[Array, ""]) -> States:
        """Where the trajectories of a group are."""
        schedule, position = pool.schedule[group], pool.position[group]
        return States(
            x=pool.x[group],
            sigma=self.sigmas[schedule, position],
            sigma_next=self.sigmas[schedule, position + 1],
            prompt=pool.prompt[group],
            guidance=pool.guidance[group],
        )

    def advance(
        self,
        pool: Pool,
        group: Int[Array, ""],
        teacher: Float[Array, "B I P"],
        student: Float[Array, "B I P"],
        moving: Bool[Array, " B"] | None = None,
    ) -> Pool:
        """One Euler step of every trajectory of a group; finished ones begin anew.

        Args:
          pool: all trajectories.
          group: which group.
          teacher, student: velocities at `states(pool, group)`.
          moving: the trajectories that take the step; all by default.
        """
        now = self.states(pool, group)
        lead = jnp.where(pool.on_policy[group][:, None, None], student, teacher)
        x = now.x + (now.sigma_next - now.sigma)[:, None, None] * lead.astype(jnp.float32)
        position = pool.position[group] + 1
        done = position >= self.lengths[pool.schedule[group]]
        started = pool.started[group] + done
        place, seed = pool.place[group], pool.seed[group]
        fresh = jax.vmap(self._begin)(seed, place, started)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        moved = Pool(
            x=choose(fresh[0], x),
            position=jnp.where(done, 0, position),
            schedule=choose(fresh[1], pool.schedule[group]),
            prompt=choose(fresh[2], pool.prompt[group]),
            guidance=choose(fresh[3], pool.guidance[group]),
            on_policy=choose(fresh[4], pool.on_policy[group]),
            started=started,
            place=place,
            seed=seed,
        )
        if moving is not None:
            moved = Pool(
                *(
                    jnp.where(moving.reshape(-1, *[1] * (m.ndim - 1)), m, o[group])
                    for m, o in zip(moved, pool, strict=True)
                )
            )
        return Pool(*(o.at[group].set(m) for o, m in zip(pool, moved, strict=True)))


def split_pool(pool: Pool, devices: int) -> Pool:
    """The pool's batches cut into equal parts, with a leading axis of devices, for `pmap`.

    Raises:
      ValueError: a batch that cannot be cut so.
    """
    batch = pool.place.shape[1]
    if batch % devices:
        raise ValueError(f"a batch of {batch} cannot be split over {devices} devices")

    def split(field: Array) -> Array:
        groups, _, *rest = field.shape
        parts = field.reshape(groups, devices, batch // devices, *rest)
        return jnp.moveaxis(parts, 1, 0)

    return Pool(*map(split, pool))
