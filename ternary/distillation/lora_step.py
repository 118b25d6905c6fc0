"""One training step of a LoRA beside frozen weights, towards a teacher with a LoRA of its own.

A LoRA is a change of the weights that it was trained beside. A student trained end to end computes
what its teacher computes, but by other weights: on its states, not around them, so the teacher's
LoRA does little to it. Its factors are a start, from which they are trained beside the student's
packed weights, at states of trajectories of the teacher that has the LoRA; no image is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flux_jax.transformer import FluxTransformer
from flux_jax.tree import Flat, split_flat
from ternary.config import DistillConfig
from ternary.distillation.optimizer import apply_gradients, learning_rate, make_optimizer
from ternary.distillation.step import Metrics, PromptRows, StepFunction, TrainState, relative_error
from ternary.distillation.trajectory import Pool, Trajectories

_FACTORS = ("lora_a", "lora_b")


class Models(NamedTuple):
    """What a step reads and does not change.

    Attributes:
      teacher: all its parameters, its LoRA's among them.
      student: all but the factors that are trained.
    """

    teacher: Flat
    student: Flat


class LoRAStep:
    """One training step as a pure function of (state, models, prompts).

    Args:
      teacher: with a LoRA beside its weights.
      student: a transformer of the same configuration, likewise; packed, as a rule.
      config: how to train; averages, block losses and accumulation are left out.
      trajectories: where states come from.
      grid: image tokens (rows, columns).
    """

    def __init__(
        self,
        teacher: FluxTransformer,
        student: FluxTransformer,
        config: DistillConfig,
        trajectories: Trajectories,
        *,
        grid: tuple[int, int],
    ):
        self.config = config
        self.trajectories = trajectories
        # Of the two models the teacher alone: it has no need of a student.
        self._guide = StepFunction(teacher, teacher, config, trajectories, grid=grid)
        self._student, _ = split_flat(student)
        self._dtype = student.dtype
        self._optimizer = make_optimizer(config)
        self._rate = learning_rate(config)

    def student(self, fixed: Flat, factors: Flat) -> FluxTransformer:
        """The student with these factors, as it computes."""
        return self._student({**fixed, **{n: v.astype(self._dtype) for n, v in factors.items()}})

    def start(self, factors: Flat, seed: int | Int[Array, ""] = 0) -> TrainState:
        """The state before the first step.

        Args:
          factors: of the student's LoRA; copied, in float32.
          seed: of every draw of the trajectories.
        """
        params = {n: jnp.array(value, jnp.float32) for n, value in factors.items()}
        return TrainState(
            params=params,
            ema={},
            optimizer=self._optimizer.init(params),
            pool=self.trajectories.start(seed),
            step=jnp.int32(0),
        )

    def lead(self, pool: Pool, group: Int[Array, ""], models: Models, rows: PromptRows) -> Pool:
        """See `StepFunction.lead`."""
        return self._guide.lead(pool, group, models.teacher, rows)

    def __call__(
        self, state: TrainState, models: Models, rows: PromptRows
    ) -> tuple[TrainState, Metrics]:
        """One optimiser step.

        Args:
          state: before the step; its `params` are the factors.
          models: see `Models`.
          rows: encoded prompts of the step's group, (B, ...).
        """
        group = state.step % state.pool.x.shape[0]
        states = self.trajectories.states(state.pool, group)
        target, _ = jax.lax.stop_gradient(
            self._guide.teacher_velocity(models.teacher, states, rows)
        )

        def loss(factors: Flat) -> tuple[Float[Array, ""], Float[Array, "B I P"]]:
            model = self.student(models.student, factors)
            velocity, _ = self._guide.velocity(model, states, rows, remat=self.config.remat)
            return jnp.mean(jnp.square(velocity - target)), velocity

        (error, velocity), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        params, optimizer = apply_gradients(self._optimizer, grads, state.optimizer, state.params)
        pool = self.trajectories.advance(state.pool, group, target, velocity)
        metrics = Metrics(
            loss=error,
            velocity=error,
            relative=jnp.mean(relative_error(velocity, target)),
            blocks=jnp.float32(0),
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(self._rate(state.step), jnp.float32),
        )
        return TrainState(params, {}, optimizer, pool, state.step + 1), metrics


def split_factors(student: FluxTransformer) -> tuple[Flat, Flat]:
    """A transformer's parameters: (all others, the factors of the LoRAs beside its weights)."""
    _, flat = split_flat(student)
    factors = {n: v for n, v in flat.items() if n.rpartition(".")[2] in _FACTORS}
    return {n: v for n, v in flat.items() if n not in factors}, factors
