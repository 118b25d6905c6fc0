"""Latents as tokens, and noise that depends on its key alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.errors import UserError
from flux_jax.latents import check_size, noise, pack, unpack


def test_pack_puts_channels_before_the_square():
    grid = jnp.arange(4.0 * 6 * 2).reshape(1, 4, 6, 2)
    tokens = pack(grid)
    assert tokens.shape == (1, 6, 8)
    # The token in row 1, column 2: its square's first channel, then the second.
    square = grid[0, 2:4, 4:6]
    np.testing.assert_array_equal(tokens[0, 5], [*square[..., 0].ravel(), *square[..., 1].ravel()])
    np.testing.assert_array_equal(unpack(tokens, 4, 6), grid)


def test_noise_is_drawn_on_the_latent_grid():
    key = jax.random.key(3, impl="threefry2x32")
    grid = jax.random.normal(key, (1, 4, 6, 2), jnp.float32)
    np.testing.assert_array_equal(unpack(noise(key, 4, 6, 2)[None], 4, 6), grid)


def test_sizes():
    check_size(48, 16, 16)
    with pytest.raises(UserError, match="height must be a multiple of 16 .* got 47; .* 32 or 48"):
        check_size(47, 16, 16)
    with pytest.raises(UserError, match="width must be a multiple of 16 .* got 0; .* is 16"):
        check_size(48, 0, 16)
    check_size(8192, 8192, 16)
    with pytest.raises(UserError, match="at most 262144 tokens .*, got 262656 .height 8192, "):
        check_size(8192, 8208, 16)
