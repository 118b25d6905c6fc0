"""The optimiser of a training, end to end or of one block, and its rate."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from flux_jax.tree import Flat
from ternary.config import DistillConfig


def learning_rate(config: DistillConfig) -> optax.Schedule:
    """Linear warm-up, constant, linear decay to zero."""
    falling = max(int(config.decay * config.steps), 1)
    warmup = min(config.warmup, max(config.steps - falling, 1))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, falling),
        ],
        [warmup, max(config.steps - falling, warmup)],
    )


def make_optimizer(config: DistillConfig) -> optax.GradientTransformation:
    """The chosen optimiser behind gradient clipping; only matrices are decayed."""
    rate = learning_rate(config)

    def matrices(params: Flat) -> dict[str, bool]:
        return {name: value.ndim > 1 for name, value in params.items()}

    if config.optimizer == "adamw":
        inner = optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay, mask=matrices)
    elif config.optimizer == "lion":
        inner = optax.lion(
            rate, mu_dtype=jnp.bfloat16, weight_decay=config.weight_decay, mask=matrices
        )
    else:
        inner = optax.adafactor(
            rate, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay or None
        )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), inner)
