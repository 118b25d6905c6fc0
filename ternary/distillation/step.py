"""Self-distillation: a ternary student learns its teacher's velocities, from prompts alone.

At states of their own trajectories (`ternary.distillation.trajectory`) the student's velocity is
pulled to the teacher's, and on request each block's output to the teacher's. One pure function
makes a step; it runs under `jit` on one device or a mesh, or under `pmap` (`pmap_step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flux_jax.kernels import leave_to_xla
from flux_jax.linears import linears
from flux_jax.partition import mesh_in_scope
from flux_jax.rope import image_ids, text_ids
from flux_jax.sharding import flat_shardings
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import Flat, split_flat, to_flat
from ternary.config import DistillConfig
from ternary.distillation.optimizer import apply_gradients, learning_rate, make_optimizer
from ternary.distillation.trajectory import Pool, States, Trajectories
from ternary.layers import FakeTernaryLinear, trained_dtype


class PromptSet(NamedTuple):
    """Encoded prompts.

    Attributes:
      txt: (N, T, K) T5 embeddings.
      pooled: (N, P) pooled CLIP embeddings.
    """

    txt: Float[Array, "N T K"]
    pooled: Float[Array, "N P"]


class PromptRows(NamedTuple):
    """The encoded prompts of given states, row by row, for one group or (A, ...) for several.

    Attributes:
      txt, pooled: as in `PromptSet`.
    """

    txt: Float[Array, "*A B T K"]
    pooled: Float[Array, "*A B P"]


class TrainState(NamedTuple):
    """Everything a step changes; what a checkpoint holds.

    Attributes:
      params: the student's parameters, latent weights among them.
      ema: their average in float32, or an empty dictionary.
      optimizer: its state.
      pool: the trajectories.
      step: steps taken.
    """

    params: Flat
    ema: Flat
    optimizer: optax.OptState
    pool: Pool
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """The figures of one step, averaged over its states.

    Attributes:
      loss: what was minimised.
      velocity: mean squared error of the velocity.
      relative: squared error of the velocity over the teacher's square, each state by itself.
      blocks: mean relative squared error of the blocks' outputs (0 where it is not asked for).
      grad_norm: before clipping.
      learning_rate: of the step.
    """

    loss: Float[Array, ""]
    velocity: Float[Array, ""]
    relative: Float[Array, ""]
    blocks: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


class StepFunction:
    """One training step as a pure function of (state, teacher's parameters, prompts).

    The prompts are all that the trajectories draw from, or the rows that this step's groups need.

    Args:
      teacher, student: transformers of one configuration; the student's linears are fake-ternary.
      config: how to train.
      trajectories: where states come from.
      grid: image tokens (rows, columns); by default, of a square.
      axis_name: the `pmap` axis over which gradients and metrics are averaged, if any.
      mesh: the devices that share the work under `jit`, if they are several.
    """

    def __init__(
        self,
        teacher: FluxTransformer,
        student: FluxTransformer,
        config: DistillConfig,
        trajectories: Trajectories,
        *,
        grid: tuple[int, int] | None = None,
        axis_name: str | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self._mesh = mesh
        self._places = None if mesh is None else flat_shardings(student, mesh)
        self.trajectories = trajectories
        self.axis_name = axis_name
        side = math.isqrt(trajectories.tokens[0])
        self._grid = (side, side) if grid is None else grid
        if math.prod(self._grid) != trajectories.tokens[0]:
            raise ValueError(
                f"grid must hold the {trajectories.tokens[0]} image tokens, got {self._grid}"
            )
        self.optimizer = make_optimizer(config)
        self._rate = learning_rate(config)
        self._teacher, _ = split_flat(teacher)
        self._student, _ = split_flat(student)
        self._latent = latent_names(student)
        self._guided = teacher.config.guidance_embed

    def velocity(
        self,
        model: FluxTransformer,
        states: States,
        text: PromptRows,
        *,
        blocks: bool = False,
        remat: bool = False,
    ) -> tuple[Float[Array, "B I P"], list[Float[Array, "B L C"]]]:
        """A model's velocity at some states, float32, and its blocks' outputs if asked for."""
        leave_to_xla(model)
        dtype = model.dtype
        grid = jnp.asarray(image_ids(*self._grid))
        words = jnp.asarray(text_ids(text.txt.shape[1]))
        guidance = states.guidance if self._guided else None
        vec = model.conditioning(states.sigma, text.pooled, guidance)
        mods = model.modulations(vec, remat=remat)
        outputs: list[Float[Array, "B L C"]] = []
        velocity = model.velocity(
            states.x.astype(dtype),
            grid,
            text.txt.astype(dtype),
            words,
            mods,
            remat=remat,
            on_block=outputs.append if blocks else None,
        )
        return velocity.astype(jnp.float32), outputs

    def student(self, params: Flat) -> FluxTransformer:
        """The student with these parameters, as it computes."""
        dtype = jnp.dtype(self.config.compute_dtype)
        # A fake-ternary layer rounds its own latent weights, and from their full precision.
        return self._student(
            {n: v if n in self._latent else v.astype(dtype) for n, v in params.items()}
        )

    def teacher_velocity(
        self, teacher: Flat, states: States, prompts: PromptSet | PromptRows
    ) -> tuple[Float[Array, "B I P"], list[Float[Array, "B L C"]]]:
        """The teacher's velocity, and its blocks' outputs if they are to be compared."""
        text = _text(prompts, states)
        blocks = self.config.block_loss > 0.0
        return self.velocity(self._teacher(teacher), states, text, blocks=blocks, remat=False)

    def loss(
        self,
        params: Flat,
        states: States,
        prompts: PromptSet | PromptRows,
        target: tuple[Float[Array, "B I P"], list[Float[Array, "B L C"]]],
    ) -> tuple[Float[Array, ""], tuple[Float[Array, "B I P"], Metrics]]:
        """The loss at some states; also the student's velocity there and the metrics of a pass."""
        model = self.student(params)
        wanted, wanted_blocks = target
        velocity, blocks = self.velocity(
            model,
            states,
            _text(prompts, states),
            blocks=bool(wanted_blocks),
            remat=self.config.remat,
        )
        error = jnp.mean(jnp.square(velocity - wanted))
        apart = [relative_error(*pair) for pair in zip(blocks, wanted_blocks, strict=True)]
        block_error = jnp.mean(jnp.stack(apart)) if apart else jnp.float32(0)
        loss = error + self.config.block_loss * block_error
        relative = jnp.mean(relative_error(velocity, wanted))
        later = jnp.float32(0)
        return loss, (velocity, Metrics(loss, error, relative, block_error, later, later))

    def __call__(
        self, state: TrainState, teacher: Flat, prompts: PromptSet | PromptRows
    ) -> tuple[TrainState, Metrics]:
        """One optimiser step over `accumulate` groups.

        Args:
          state: before the step.
          teacher: parameters of the teacher.
          prompts: all of them, or (accumulate, B, ...) rows for the states of the step's groups.
        """
        with mesh_in_scope(self._mesh):
            grads, pool, metrics = self._gradients(state, teacher, prompts)
            params, optimizer = apply_gradients(
                self.optimizer, grads, state.optimizer, state.params
            )
        decay = self.config.ema
        ema = (
            jax.tree.map(
                lambda e, p: decay * e + (1.0 - decay) * p.astype(e.dtype), state.ema, params
            )
            if decay
            else {}
        )
        # Asked of the schedule by the host, it would wait for the device.
        metrics = metrics._replace(learning_rate=jnp.asarray(self._rate(state.step), jnp.float32))
        return TrainState(params, ema, optimizer, pool, state.step + 1), metrics

    def _gradients(
        self, state: TrainState, teacher: Flat, prompts: PromptSet | PromptRows
    ) -> tuple[Flat, Pool, Metrics]:
        """Mean gradients of the step's groups, and the pool after their Euler steps."""
        groups = state.pool.x.shape[0]
        count = self.config.accumulate
        sums = self._placed(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params))

        def one(
            carry: tuple[Pool, Flat], turn: tuple[Int[Array, ""], PromptRows | None]
        ) -> tuple[Any, Metrics]:
            (pool, sums), (index, rows) = carry, turn
            text = prompts if rows is None else rows
            group = (state.step * count + index) % groups
            states = self.trajectories.states(pool, group)
            target = jax.lax.stop_gradient(self.teacher_velocity(teacher, states, text))
            (_, (velocity, metrics)), grads = jax.value_and_grad(self.loss, has_aux=True)(
                state.params, states, text, target
            )
            pool = self.trajectories.advance(pool, group, target[0], velocity)
            grads = self._placed(grads)
            sums = jax.tree.map(lambda a, g: a + g.astype(jnp.float32) / count, sums, grads)
            return (pool, sums), metrics

        rows = prompts if isinstance(prompts, PromptRows) else None
        (pool, grads), metrics = jax.lax.scan(one, (state.pool, sums), (jnp.arange(count), rows))
        metrics = jax.tree.map(jnp.mean, metrics)
        if self.axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), self.axis_name)
        return grads, pool, metrics._replace(grad_norm=optax.tree.norm(grads))

    def _placed(self, tree: Flat) -> Flat:
        """Something of the parameters' shapes, split over the devices as they are.

        Said of the gradients, lest each device sum up whole ones before it takes its part.
        """
        if self._places is None:
            return tree
        return {n: jax.lax.with_sharding_constraint(v, self._places[n]) for n, v in tree.items()}

    def start(self, params: Flat, seed: int | Int[Array, ""] = 0) -> TrainState:
        """The state before the first step, from the student's parameters, which are copied.

        Args:
          params: latent weights of the student, and its other parameters.
          seed: of every draw of the trajectories.
        """
        master = jnp.dtype(self.config.master_dtype)
        params = {n: jnp.array(value, trained_dtype(n, master)) for n, value in params.items()}
        # In bf16 an average would stand still: a step's part of it is below half a unit.
        ema = {n: jnp.array(value, jnp.float32) for n, value in params.items()}
        return TrainState(
            params=params,
            ema=ema if self.config.ema else {},
            optimizer=self.optimizer.init(params),
            pool=self.trajectories.start(seed),
            step=jnp.int32(0),
        )

    def lead(
        self, pool: Pool, group: Int[Array, ""], teacher: Flat, prompts: PromptSet | PromptRows
    ) -> Pool:
        """Lead each trajectory of a fresh group, by the teacher, to its place in time.

        Args:
          pool: all trajectories.
          group: which group.
          teacher: parameters of the teacher.
          prompts: all of them, or the rows of this group's states.
        """
        targets = self.trajectories.stagger(pool)[group]

        def step_of(pool: Pool, step: Int[Array, ""]) -> tuple[Pool, None]:
            states = self.trajectories.states(pool, group)
            velocity, _ = self.teacher_velocity(teacher, states, prompts)
            moving = step < targets
            return self.trajectories.advance(pool, group, velocity, velocity, moving), None

        steps = max(self.trajectories.config.sampling_steps) - 1
        with mesh_in_scope(self._mesh):
            pool, _ = jax.lax.scan(step_of, pool, jnp.arange(steps))
        return pool

    def spread(self, pool: Pool, teacher: Flat, prompts: PromptSet) -> Pool:
        """`lead` for every group.

        So the first training step sees all noise levels, as every later one does.
        """

        def one(pool: Pool, group: Int[Array, ""]) -> tuple[Pool, None]:
            return self.lead(pool, group, teacher, prompts), None

        pool, _ = jax.lax.scan(one, pool, jnp.arange(pool.x.shape[0]))
        return pool


def pmap_step(step: StepFunction) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step under `pmap`, data-parallel: the classic form, kept for machines without a mesh.

    Args:
      step: made with `axis_name="data"`.

    Returns:
      A function of replicated state (but for the pool: `trajectory.split_pool`), replicated teacher
      and prompts; each with a leading axis of devices.
    """
    if step.axis_name is None:
        raise ValueError("pmap_step needs a StepFunction with an axis_name")
    return jax.pmap(step, axis_name=step.axis_name)


def latent_names(student: nnx.Module) -> frozenset[str]:
    """Names of all parameters that belong to a fake-ternary layer."""
    layers = linears(student, FakeTernaryLinear).keys()
    return frozenset(name for name in to_flat(student) if name.rpartition(".")[0] in layers)


def _text(prompts: PromptSet | PromptRows, states: States) -> PromptRows:
    if isinstance(prompts, PromptRows):
        return prompts
    return PromptRows(*(jnp.take(field, states.prompt, axis=0) for field in prompts))


def relative_error(
    ours: Float[Array, "B ..."], theirs: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """Each row's `|ours - theirs|^2 / |theirs|^2`, float32: a batch may be split over devices."""
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    axes = tuple(range(1, ours.ndim))
    return jnp.sum(jnp.square(ours - theirs), axis=axes) / jnp.sum(jnp.square(theirs), axis=axes)
