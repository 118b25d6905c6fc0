"""The optimiser of a training, end to end or of one block, and its rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from flux_jax.tree import Flat
from ternary.config import CalibrateConfig, DistillConfig


def learning_rate(config: DistillConfig | CalibrateConfig) -> optax.Schedule:
    """Linear warm-up, constant, linear decay to zero; no step has the rate zero."""
    falling = max(int(config.decay * config.steps), 1)
    warmup = min(config.warmup, max(config.steps - falling, 1))
    first = config.learning_rate / max(warmup, 1)
    return optax.join_schedules(
        [
            # Steps count from 0: the last step of the warm-up has the whole rate.
            optax.linear_schedule(first, config.learning_rate + first, warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, falling),
        ],
        [warmup, max(config.steps - falling, warmup)],
    )


def make_optimizer(config: DistillConfig | CalibrateConfig) -> optax.GradientTransformation:
    """The chosen optimiser behind gradient clipping.

    A step takes `rate * weight_decay` of every matrix away, whichever the optimiser. Learned scales
    are no matrices, though there may be one for each group of a weight.
    """
    rate = learning_rate(config)

    def matrices(params: Flat) -> dict[str, bool]:
        return {
            name: value.ndim > 1 and name.rpartition(".")[2] != "log_scale"
            for name, value in params.items()
        }

    if config.optimizer == "adamw":
        inner = optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay, mask=matrices)
    elif config.optimizer == "lion":
        inner = optax.lion(
            rate, mu_dtype=jnp.bfloat16, weight_decay=config.weight_decay, mask=matrices
        )
    else:
        # Adafactor's own decay comes after the rate. Its updates have the sign of a descent.
        inner = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-config.weight_decay, mask=matrices),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), inner)


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Flat, state: optax.OptState, params: Flat
) -> tuple[Flat, optax.OptState]:
    """One step of an optimiser; all parameters and moments keep their dtypes.

    Args:
      optimizer: of `make_optimizer`.
      grads: in float32 or the parameters' dtype.
      state: before the step.
      params: before the step.

    Returns:
      (params, state) after it.
    """
    updates, after = optimizer.update(grads, state, params)
    # Moments in bf16 become float32 where gradients are: twice the memory, and another program.
    after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
    return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), after
