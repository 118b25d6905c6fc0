"""Layers by themselves; tests/parity compares what is built of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax import layers
from flux_jax.layers import GroupNorm, lookup, param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("one_hot_rows", [16, 15], ids=["one-hot", "scatter"])
def test_the_gradient_of_a_look_up_is_that_of_take(dtype, one_hot_rows, monkeypatch):
    """Summed over the places of a row, which occur many times; rows that do not occur have none."""
    monkeypatch.setattr(layers, "_ONE_HOT_ROWS", one_hot_rows)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((16, 5)), dtype)
    ids = jnp.asarray(rng.integers(0, 8, (3, 4)))
    # Whole numbers: their sums are exact in every order.
    weights = jnp.asarray(rng.integers(-4, 5, (3, 4, 5)), dtype)
    found, expected = (
        jax.grad(lambda table, rows=rows: jnp.sum(weights * rows(table)))(table)
        for rows in (lambda table: lookup(table, ids), lambda table: table[ids])
    )
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert not np.asarray(found[8:], np.float32).any()


def test_a_parameter_names_each_of_its_axes():
    zeros = jax.nn.initializers.zeros
    with pytest.raises(ValueError, match="name 1 dimensions, shape is"):
        param(zeros, nnx.Rngs(0), (2, 3), jnp.float32, ("embed",))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="channels 6 must be a multiple of num_groups 4"):
        GroupNorm(4, 6, rngs=nnx.Rngs(0))
