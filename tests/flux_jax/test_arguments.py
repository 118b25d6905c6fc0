"""Values of the wrong kind, which a type checker would not let through to the pipeline."""

from __future__ import annotations

import jax
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


@pytest.mark.parametrize("value", ["7", 7.5, [1, 2, 3], [1, "2"]])
def test_seed(value):
    with pytest.raises(UserError, match=r"seed must be (one integer or 2|a whole number)"):
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
    data = jax.random.key_data(keys)
    np.testing.assert_array_equal(data, [[0, 2**32 - 2], [0, 2**32 - 1]])
    with pytest.raises(UserError, match=r"below 2\*\*32 for every image, got 4294967296"):
        arguments.seeds_and_keys(2**32 - 1, None, 2)
