"""The flow-matching Euler sampler: noise levels on the host, one update rule on the device.

A latent at noise level sigma is `(1 - sigma) * clean + sigma * noise`; the transformer predicts the
velocity `noise - clean`. Follows diffusers' `FlowMatchEulerDiscreteScheduler`, whose `mu` is Black
Forest Labs' resolution-dependent shift (`src/flux/sampling.py`, `get_schedule`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Float

from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The noise levels of one sampling run.

    Attributes:
      timesteps: (S,) float32, what the transformer is told at each step: sigma, gone through
        the scale of the training steps and back as in diffusers, whose rounding it shares.
      sigmas: (S + 1,) float32, falling from about 1 to exactly 0.
    """

    timesteps: Float[np.ndarray, " S"]
    sigmas: Float[np.ndarray, " S+1"]

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.timesteps)


def dynamic_shift(config: SchedulerConfig, image_tokens: int) -> float:
    """The shift exponent `mu`: linear in the image tokens, through the two known points."""
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return image_tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def make_schedule(config: SchedulerConfig, num_steps: int, image_tokens: int) -> Schedule:
    """Noise levels for `num_steps` Euler steps on an image of `image_tokens` tokens.

    The arithmetic is float32 after the first line, operation for operation that of diffusers.

    Args:
      config: the model's scheduler.
      num_steps: at least 1.
      image_tokens: (height / 16) * (width / 16) for FLUX.1; only used with dynamic shifting.

    Raises:
      UserError: `num_steps` below 1, or a `time_shift_type` that does not exist.
    """
    if num_steps < 1:
        raise UserError(f"num_inference_steps must be at least 1, got {num_steps}")
    uniform = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)
    if not config.use_dynamic_shifting:
        shifted = config.shift * uniform / (1 + (config.shift - 1) * uniform)
    else:
        mu = dynamic_shift(config, image_tokens)
        if config.time_shift_type == "exponential":
            numerator = math.exp(mu)
        elif config.time_shift_type == "linear":
            numerator = mu
        else:
            raise UserError(
                f"time_shift_type must be 'exponential' or 'linear', got {config.time_shift_type!r}"
            )
        shifted = numerator / (numerator + (1 / uniform - 1))
    shifted = shifted.astype(np.float32)
    scale = np.float32(config.num_train_timesteps)
    return Schedule(
        # diffusers divides by 1000 whatever `num_train_timesteps` says.
        timesteps=shifted * scale / np.float32(1000.0),
        sigmas=np.append(shifted, np.float32(0.0)),
    )


def euler_step(
    latents: Float[Array, "*B C"],
    velocity: Float[Array, "*B C"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
) -> Float[Array, "*B C"]:
    """Latents at `sigma_next`, a straight line along `velocity` from those at `sigma`.

    Pass float32: in bf16 the small late steps round away.
    """
    return latents + (sigma_next - sigma) * velocity


def predict_clean(
    latents: Float[Array, "*B C"], velocity: Float[Array, "*B C"], sigma: Float[Array, ""]
) -> Float[Array, "*B C"]:
    """The clean image (x0) that `velocity` points at: the Euler step all the way to sigma 0."""
    return latents - sigma * velocity
