"""How weights are quantised, and how a student is trained: small frozen configs."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from flux_jax import arguments
from flux_jax.errors import UserError
from pallas_kernels import group_count

# In the order of the scale's dimensions: (), (N,), (N, G).
GRANULARITIES = ("tensor", "channel", "group128")
ACTIVATION_BITS = (8, 16)
OPTIMIZERS = ("adamw", "adafactor", "lion")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What a ternary layer looks like.

    Attributes:
      granularity: what shares a scale: "tensor", "channel" (an output), or "group128" (128 inputs
        of an output).
      activation_bits: 16, or 8 for int8 activations with a scale per token.
      rank: columns of a low-rank branch beside the ternary weight, in 16 bits; 0 for none.
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
        arguments.choice("granularity", self.granularity, GRANULARITIES)
        if self.activation_bits not in ACTIVATION_BITS:
            raise UserError(f"activation_bits must be 8 or 16, got {self.activation_bits!r}")
        check_counts(self, "activation_bits")
        check_counts(self, "rank", "refit_steps", least=0)
        _check_flags(self, "learned_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Where the states come from.

    Attributes:
      sampling_steps: numbers of Euler steps; each trajectory draws one.
      on_policy: share of the trajectories that follow the student.
      guidance: range from which each trajectory draws its scale (guidance-distilled models).
      groups: groups of the pool, of which a step takes as many as it accumulates, in turn: a
        trajectory is met again after groups / accumulate training steps.
    """

    sampling_steps: tuple[int, ...] = (20, 28)
    on_policy: float = 0.3
    guidance: tuple[float, float] = (1.0, 5.0)
    groups: int = 4

    def __post_init__(self) -> None:
        given = _items(self, "sampling_steps", "a tuple of numbers of steps, as (20, 28)")
        if not given:
            raise UserError("sampling_steps must have at least one number of steps, got none")
        store(self, "sampling_steps", tuple(arguments.integer("sampling_steps", n) for n in given))
        _check_guidance(self)
        _check_shares(self, "on_policy")
        check_counts(self, "groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the student is trained.

    Attributes:
      steps: optimiser steps.
      accumulate: groups of trajectories whose gradients are averaged for one step.
      optimizer: "adamw", or with small state "adafactor" (factored) or "lion" (one bf16 moment).
      learning_rate: the rate at its highest.
      warmup: steps over which the rate rises.
      decay: share of all steps, at their end, over which the rate falls to zero.
      weight_decay: what the matrices lose in a step, times the rate.
      max_grad_norm: a gradient of a larger norm is scaled down to it; infinity for never.
      block_loss: weight of the blocks' outputs, each as squared error over the teacher's square.
      remat: recompute blocks in the gradient, but for gated products and cuDNN's attention.
      compute_dtype: type that the student's passes compute in. With float32, biases, low-rank
        branches and dense parameters are rounded to bf16 only when they are saved: the last
        drawing of held-out prompts is then not bit for bit the saved student's.
      master_dtype: type of the latent weights and of the optimiser's state.
      ema: decay of an average of the weights, which is then what is drawn and saved; 0 keeps none.
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
        _check_training(self)
        _check_flags(self, "remat")
        _check_scales(self, "block_loss")
        _check_shares(self, "ema")
        if self.ema == 1:
            raise UserError("ema must be below 1, got 1: the average would never move")


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
      blocks: which parts are trained: the first so many blocks, or names; None for all. The others
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
        _check_guidance(self)
        check_counts(self, "samples", "states_each", "sampling_steps", "batch_size")
        _check_training(self)
        if self.states_each > self.sampling_steps:
            raise UserError(
                f"states_each must be at most sampling_steps ({self.sampling_steps}), got "
                f"{self.states_each}"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"accumulate must divide batch_size ({self.batch_size}), got {self.accumulate}"
            )
        store(self, "blocks", _blocks(self.blocks))
        check_counts(self, "seed", least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How a teacher's LoRA is adapted to a student.

    Attributes:
      steps: optimiser steps.
      batch_size: states of a step.
      learning_rate: at its highest; it rises over the first steps and falls over the second half.
      remat: recompute blocks in the gradient, where memory is short.
      seed: of every draw.
      checkpoint_every: steps from one checkpoint to the next.
    """

    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    remat: bool = False
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "checkpoint_every")
        check_counts(self, "seed", least=0)
        # What is wrong with the others is said here too.
        self.training()

    def training(self) -> DistillConfig:
        """The same for the optimiser."""
        return DistillConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=10,
            decay=0.5,
            remat=self.remat,
        )


def scale_shape(granularity: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """The shape of a weight's scale: (), (N,) or (N, G)."""
    return {
        "tensor": (),
        "channel": (out_features,),
        "group128": (out_features, group_count(in_features)),
    }[granularity]


def store(config: Any, name: str, value: Any) -> None:
    """Put a field's plain Python value in its place: NumPy's has no YAML, and a list no hash."""
    object.__setattr__(config, name, value)


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """Fields that are whole numbers.

    Raises:
      UserError: one that is none, or below `least`.
    """
    for name in names:
        store(config, name, arguments.integer(name, getattr(config, name), least=least))


def _check_flags(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise UserError(f"{name} must be True or False, got {getattr(config, name)!r}")


def _check_scales(config: Any, *names: str) -> None:
    for name in names:
        store(config, name, arguments.scale(name, getattr(config, name)))


def _check_shares(config: Any, *names: str) -> None:
    for name in names:
        value = arguments.scale(name, getattr(config, name))
        if value > 1:
            raise UserError(f"{name} must be in [0, 1], got {value}")
        store(config, name, value)


def _check_training(config: DistillConfig | CalibrateConfig) -> None:
    """What the training of all blocks and that of one have in common."""
    arguments.choice("optimizer", config.optimizer, OPTIMIZERS)
    for name in ("compute_dtype", "master_dtype"):
        arguments.choice(name, getattr(config, name), DTYPES)
    check_counts(config, "steps", "accumulate")
    check_counts(config, "warmup", least=0)
    _check_scales(config, "learning_rate", "weight_decay")
    _check_shares(config, "decay")
    # Infinity is no clipping.
    norm = config.max_grad_norm
    if not isinstance(norm, numbers.Real) or isinstance(norm, bool) or not norm > 0:
        raise UserError(f"max_grad_norm must be above 0, got {norm!r}")
    store(config, "max_grad_norm", float(norm))


def _items(config: Any, name: str, expected: str) -> tuple[Any, ...]:
    value = getattr(config, name)
    if not isinstance(value, list | tuple):
        raise UserError(f"{name} must be {expected}, got {value!r}")
    return tuple(value)


def _check_guidance(config: Any) -> None:
    value = _items(config, "guidance", "a range (low, high)")
    bounds = tuple(arguments.scale("guidance", each) for each in value)
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise UserError(f"guidance must be a range (low, high), got {value}")
    store(config, "guidance", bounds)


def _blocks(value: Any) -> int | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    raise UserError(
        "blocks must be a number of at least 0, or names, as ('double_blocks.0',), or None, got "
        f"{value!r:.60}"
    )
