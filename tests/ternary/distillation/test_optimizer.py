"""The optimiser: its rate from step to step, what it decays, and the dtypes that it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ternary.config import OPTIMIZERS, DistillConfig
from ternary.distillation.optimizer import apply_gradients, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"steps": 1, "warmup": 200}, [1]),
        ({"steps": 2, "warmup": 0, "decay": 0.5}, [1, 1]),
        ({"steps": 8, "warmup": 2, "decay": 0.5}, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        # Never so long that the rate would fall before it has risen.
        ({"steps": 4, "warmup": 200, "decay": 0.5}, [0.5, 1, 1, 0.5]),
    ],
)
def test_every_step_has_a_rate(settings, rates):
    rate = learning_rate(DistillConfig(learning_rate=1.0, **settings))
    np.testing.assert_allclose([rate(step) for step in range(len(rates))], rates, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_alone_are_decayed_by_the_rate(name):
    """Without a gradient a step leaves 1 - rate * weight_decay of a matrix, and all of the rest."""
    config = DistillConfig(
        steps=10, warmup=0, decay=0.0, learning_rate=1e-3, weight_decay=0.1, optimizer=name
    )
    # A learned scale of groups is (N, G), and a logarithm: to decay it is to draw it to 1.
    params = {
        "lin.weight": jnp.ones((4, 256)),
        "lin.log_scale": jnp.ones((4, 2)),
        "lin.bias": jnp.ones(4),
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(config)
    after, state = params, optimizer.init(params)
    # The last step's rate falls already.
    for _ in range(9):
        after, state = apply_gradients(optimizer, zeros, state, after)
    np.testing.assert_allclose(after["lin.weight"], (1 - 1e-4) ** 9, rtol=1e-6)
    np.testing.assert_array_equal(after["lin.log_scale"], 1)
    np.testing.assert_array_equal(after["lin.bias"], 1)


def test_adafactor_without_decay_is_optax_own():
    config = DistillConfig(steps=10, warmup=0, optimizer="adafactor", max_grad_norm=float("inf"))
    params = {"lin.weight": jnp.ones((4, 4)), "lin.bias": jnp.ones(4)}
    grads = jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), params)
    ours = make_optimizer(config)
    theirs = optax.adafactor(learning_rate(config), multiply_by_parameter_scale=False)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    found, _ = ours.update(grads, ours.init(params), params)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def test_a_large_gradient_is_scaled_down_and_no_other():
    """By the norm of all of it together; AdamW's second step tells how large the first was."""
    large = {"lin.weight": jnp.full((2, 2), 2.0), "lin.bias": jnp.full(1, 3.0)}
    small = jax.tree.map(lambda g: g / 50, large)
    clipped = make_optimizer(DistillConfig(max_grad_norm=1.0, warmup=0))
    free = make_optimizer(DistillConfig(max_grad_norm=float("inf"), warmup=0))
    params = jax.tree.map(jnp.ones_like, large)
    found, expected = (params, clipped.init(params)), (params, free.init(params))
    # The large one's norm is 5.
    for given, as_if in ((large, jax.tree.map(lambda g: g / 5, large)), (small, small)):
        found = apply_gradients(clipped, given, found[1], found[0])
        expected = apply_gradients(free, as_if, expected[1], expected[0])
    for key, value in expected[0].items():
        np.testing.assert_allclose(found[0][key] - 1, value - 1, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_state_keeps_its_dtypes(name, dtype):
    """Gradients are float32 for parameters of any dtype; a moment in bf16 stays in bf16."""
    optimizer = make_optimizer(DistillConfig(optimizer=name, master_dtype=dtype))
    params = {"lin.weight": jnp.ones((256, 256), dtype), "lin.bias": jnp.ones(256, dtype)}
    grads = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    before = params, jax.eval_shape(optimizer.init, params)

    def step(params, state):
        return apply_gradients(optimizer, grads, state, params)

    after = jax.eval_shape(step, *before)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)] for x in (before, after)]
    assert kinds[0] == kinds[1]
