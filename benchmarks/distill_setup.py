"""A distillation step on a mesh, in shapes alone: what the plan compiles and the benchmark runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.sharding import flat_shardings
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat
from ternary.config import DistillConfig, QuantConfig, TrajectoryConfig
from ternary.distillation.placement import Start, abstract_student, batch_split, with_shardings
from ternary.distillation.step import PromptRows, StepFunction
from ternary.distillation.trajectory import Trajectories
from ternary.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A step and the shapes that it takes, each with its place.

    Attributes:
      step: the training step.
      start: makes its state.
      teacher: the teacher's parameters.
      rows: the encoded prompts of a step.
      program: the step under `jit`, its state donated.
    """

    step: StepFunction
    start: Start
    teacher: dict[str, Any]
    rows: PromptRows
    program: Any

    @classmethod
    def of(
        cls,
        flux: FluxConfig,
        mesh: Mesh,
        config: DistillConfig,
        *,
        tokens: int,
        text: int,
        batch: int,
        teacher: FluxTransformer | None = None,
    ) -> Setup:
        """W1.58A16 with learned scales, at random states.

        Args:
          flux: the transformer.
          mesh: the devices.
          config: of the training; it groups no states.
          tokens, text: image tokens (a square number) and text tokens of a state.
          batch: states of a step, over all devices.
          teacher: on the mesh; by default of shapes alone.
        """
        if teacher is None:
            teacher = nnx.eval_shape(lambda: FluxTransformer(flux, rngs=nnx.Rngs(0)))
        quant, policy = QuantConfig(learned_scale=True), Policy()
        student = abstract_student(teacher, quant, policy, config)
        trajectories = Trajectories(
            TrajectoryConfig(),
            SchedulerConfig.dev(),
            tokens=(tokens, flux.in_channels),
            batch_size=batch,
            prompts=7232,
        )
        step = StepFunction(teacher, student, config, trajectories, mesh=mesh)
        start = Start(step, teacher, student, quant, policy, seed=0, mesh=mesh)

        def row(*shape: int) -> Any:
            place = batch_split(shape, mesh)
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

        return cls(
            step=step,
            start=start,
            teacher=with_shardings(split_flat(teacher)[1], flat_shardings(teacher, mesh)),
            rows=PromptRows(
                row(1, batch, text, flux.context_in_dim), row(1, batch, flux.vec_in_dim)
            ),
            program=jax.jit(step, donate_argnums=0, out_shardings=(start.shardings, None)),
        )

    def compiled(self) -> Any:
        """The step, compiled for its mesh."""
        return self.program.lower(self.start.abstract(), self.teacher, self.rows).compile()
