"""How weights are quantised, and how a student is trained: small frozen configs."""

from __future__ import annotations

import dataclasses

from flux_jax.errors import UserError
from pallas_kernels import group_count

GRANULARITIES = ("tensor", "channel", "group128")
ACTIVATION_BITS = (8, 16)
OPTIMIZERS = ("adamw", "adafactor", "lion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What a ternary layer looks like.

    Attributes:
      granularity: what shares a scale: "tensor", "channel" (an output), or "group128" (128 inputs
        of an output).
      activation_bits: 16, or 8 for int8 activations with a scale per token.
      rank: of the 16-bit branch beside the ternary weight; 0 for none.
      refit_steps: alternating least-squares fits of codes and scale after the absolute mean.
      learned_scale: in training, a scale is a parameter of its own rather than a function of the
        latent weight.
    """

    granularity: str = "channel"
    activation_bits: int = 16
    rank: int = 0
    refit_steps: int = 0
    learned_scale: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise UserError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        if self.activation_bits not in ACTIVATION_BITS:
            raise UserError(f"activation_bits must be 8 or 16, got {self.activation_bits!r}")
        for name in ("rank", "refit_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{name} must be an integer of at least 0, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Where the states come from.

    Attributes:
      sampling_steps: numbers of Euler steps; each trajectory draws one.
      on_policy: share of the trajectories that follow the student.
      guidance: range from which each trajectory draws its scale (guidance-distilled models).
      groups: groups of the pool; a trajectory is met again after this many training steps.
    """

    sampling_steps: tuple[int, ...] = (20, 28)
    on_policy: float = 0.3
    guidance: tuple[float, float] = (1.0, 5.0)
    groups: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling_steps", tuple(self.sampling_steps))
        object.__setattr__(self, "guidance", tuple(self.guidance))
        if not self.sampling_steps or min(self.sampling_steps) < 1:
            raise UserError(f"sampling_steps must be positive, got {self.sampling_steps}")
        if not 0.0 <= self.on_policy <= 1.0:
            raise UserError(f"on_policy is a share in [0, 1], got {self.on_policy}")
        if len(self.guidance) != 2 or not 0.0 <= self.guidance[0] <= self.guidance[1]:
            raise UserError(f"guidance is a range (low, high), got {self.guidance}")
        if self.groups < 1:
            raise UserError(f"groups must be at least 1, got {self.groups}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the student is trained.

    Attributes:
      steps: optimiser steps.
      accumulate: groups of trajectories whose gradients are averaged for one step.
      optimizer: "adamw", or with small state "adafactor" (factored) or "lion" (one bf16 moment).
      warmup: steps over which the rate rises; `decay`: share of all steps, at their end, over which
        it falls to zero.
      block_loss: weight of the blocks' outputs, each as squared error over the teacher's square.
      remat: recompute blocks in the gradient.
      compute_dtype: of the student's passes; the latent weights and the optimiser are float32 or
        what `master_dtype` says.
      ema: decay of an average of the weights; 0 keeps none.
    """

    steps: int = 10_000
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    warmup: int = 200
    decay: float = 0.4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    block_loss: float = 0.0
    remat: bool = False
    compute_dtype: str = "bfloat16"
    master_dtype: str = "float32"
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        for name in ("compute_dtype", "master_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                value = getattr(self, name)
                raise UserError(f"{name} must be float32 or bfloat16, got {value!r}")
        if self.steps < 1 or self.accumulate < 1:
            raise UserError(
                f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}"
            )
        if not 0.0 <= self.ema < 1.0:
            raise UserError(f"ema must be in [0, 1), got {self.ema}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How a transformer is calibrated block by block.

    Attributes:
      samples: states at which every block is trained.
      states_each: how many of them one trajectory of the teacher gives, spread over its length.
      sampling_steps: Euler steps of a trajectory.
      guidance: range from which each trajectory draws its scale (guidance-distilled models).
      batch_size: samples of an optimiser step, and of a pass without gradients.
      accumulate: parts in which a batch goes through the gradient: memory for time.
      steps: optimiser steps of each block.
      learning_rate: at its highest; best in proportion to the weights: a quarter of the default at
        FLUX.1-dev's width.
      warmup, decay, optimizer, weight_decay, max_grad_norm: as in `DistillConfig`, for each block.
      compute_dtype: of all passes and of the streams.
      master_dtype: of the latent weights and the optimiser.
      blocks: which blocks are trained: the first so many, or their names; None for all. The others
        are only rounded.
      seed: of every draw.
    """

    samples: int = 256
    states_each: int = 4
    sampling_steps: int = 20
    guidance: tuple[float, float] = (1.0, 5.0)
    batch_size: int = 8
    accumulate: int = 1
    steps: int = 200
    learning_rate: float = 2e-3
    warmup: int = 10
    decay: float = 0.5
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    compute_dtype: str = "bfloat16"
    master_dtype: str = "float32"
    blocks: int | tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", tuple(self.guidance))
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        counts = ("samples", "states_each", "sampling_steps", "batch_size", "accumulate", "steps")
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.states_each > self.sampling_steps:
            raise UserError(
                f"states_each must be at most sampling_steps ({self.sampling_steps}), got "
                f"{self.states_each}"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"accumulate must divide batch_size ({self.batch_size}), got {self.accumulate}"
            )
        if len(self.guidance) != 2 or not 0.0 <= self.guidance[0] <= self.guidance[1]:
            raise UserError(f"guidance is a range (low, high), got {self.guidance}")
        if isinstance(self.blocks, int) and self.blocks < 0:
            raise UserError(f"blocks must be a number of at least 0, or names, got {self.blocks}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32), got {self.seed}")
        self.training()

    def training(self) -> DistillConfig:
        """One block's training, as a configuration of the optimiser.

        Raises:
          UserError: a field that `DistillConfig` refuses.
        """
        return DistillConfig(
            steps=self.steps,
            accumulate=self.accumulate,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            decay=self.decay,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            compute_dtype=self.compute_dtype,
            master_dtype=self.master_dtype,
        )


def scale_shape(granularity: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """The shape of a weight's scale: (), (N,) or (N, G)."""
    return {
        "tensor": (),
        "channel": (out_features,),
        "group128": (out_features, group_count(in_features)),
    }[granularity]
