"""Values of the wrong kind, which a type checker would not let through to the pipeline."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax import arguments
from flux_jax.errors import UserError


@pytest.mark.parametrize("value", [None, [], ["a", 3], 7, b"bytes"])
def test_texts(value):
    with pytest.raises(UserError, match="prompt must be a text or a non-empty list of texts"):
        arguments.texts("prompt", value)
    assert arguments.texts("prompt", ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize("value", [32.0, "32", None, True])
def test_integer(value):
    with pytest.raises(UserError, match="width must be a whole number of at least 1, got"):
        arguments.integer("width", value)
    assert arguments.integer("width", np.int64(32)) == 32


@pytest.mark.parametrize("make", [np.int32, jnp.int32, np.array, jnp.array])
def test_scalars_of_numpy_and_jax(make):
    """Plain numbers come out, which a record can hold."""
    assert type(arguments.integer("width", make(32))) is int
    assert type(arguments.scale("scale", make(2))) is float
    assert arguments.finite("scale", make(2)) == 2.0
    assert arguments.seeds_and_keys(make(3), None, 2)[0] == (3, 4)


@pytest.mark.parametrize(
    "value", [np.float32(32), np.array([32]), jnp.array([32]), np.True_, jnp.array(True)], ids=repr
)
def test_other_arrays_are_no_integers(value):
    with pytest.raises(UserError, match="width must be a whole number of at least 1, got"):
        arguments.integer("width", value)


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones(1), np.True_, np.complex64(1)], ids=repr)
def test_other_arrays_are_no_scales(value):
    with pytest.raises(UserError, match="scale must be a finite number of at least 0, got"):
        arguments.scale("scale", value)


def test_what_is_being_traced_is_no_number():
    for check, kind in ((arguments.integer, jnp.int32), (arguments.scale, jnp.float32)):
        with pytest.raises(UserError, match="x must be a "):
            jax.eval_shape(lambda x, check=check: check("x", x), jax.ShapeDtypeStruct((), kind))


@pytest.mark.parametrize("value", [np.arange(2), jnp.arange(2), [np.int64(0), jnp.int32(1)]])
def test_arrays_of_seeds(value):
    seeds, keys = arguments.seeds_and_keys(value, None, 2)
    assert seeds == (0, 1)
    assert {type(seed) for seed in seeds} == {int}
    assert len(keys) == 2


def test_integer_with_an_upper_bound():
    assert arguments.integer("steps", 5, most=5) == 5
    for value in (0, 6, 10**30):
        with pytest.raises(
            UserError, match=f"steps must be a whole number from 1 to 5, got {value}"
        ):
            arguments.integer("steps", value, most=5)


@pytest.mark.parametrize(
    "value", ["3.5", None, True, float("inf"), -1, pytest.param(10**400, id="no float")]
)
def test_scale(value):
    with pytest.raises(UserError, match="scale must be a finite number of at least 0, got"):
        arguments.scale("scale", value)
    assert arguments.scale("scale", np.float32(3.5)) == 3.5


@pytest.mark.parametrize(
    "value", ["7", 7.5, [1, 2, 3], [1, "2"], np.arange(3), np.zeros((1, 2), int), np.ones(2)]
)
def test_seed(value):
    with pytest.raises(
        UserError, match=r"seed must be (one integer or a list of 2|a whole number)"
    ):
        arguments.seeds_and_keys(value, None, 2)


@pytest.mark.parametrize("value", [3, np.zeros(2, np.uint32), "key"])
def test_key(value):
    with pytest.raises(UserError, match="key must be a typed JAX key"):
        arguments.seeds_and_keys(None, value, 1)


@pytest.mark.parametrize("value", ["noise", [[0.0], [1.0, 2.0]], object()])
def test_latents(value):
    with pytest.raises(UserError, match="latents must be an array of numbers: "):
        arguments.initial_latents(value, (1, 4, 16))


def test_largest_seed_is_not_cut():
    seeds, keys = arguments.seeds_and_keys(2**32 - 2, None, 2)
    assert seeds == (2**32 - 2, 2**32 - 1)
    data = [jax.random.key_data(key) for key in keys]
    np.testing.assert_array_equal(data, [[0, 2**32 - 2], [0, 2**32 - 1]])
    with pytest.raises(UserError, match=r"below 2\*\*32 for every image, got 4294967296"):
        arguments.seeds_and_keys(2**32 - 1, None, 2)
