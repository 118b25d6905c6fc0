"""The noise schedule and the Euler step, against closed forms."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.scheduler import dynamic_shift, euler_step, make_schedule, predict_clean

DEV, SCHNELL = SchedulerConfig.dev(), SchedulerConfig.schnell()


def test_schnell_is_uniform():
    schedule = make_schedule(SCHNELL, 4, 4096)
    np.testing.assert_array_equal(schedule.sigmas, np.float32([1.0, 0.75, 0.5, 0.25, 0.0]))
    np.testing.assert_array_equal(schedule.timesteps, schedule.sigmas[:-1])


def test_constant_shift_moves_towards_noise():
    shifted = make_schedule(dataclasses.replace(SCHNELL, shift=3.0), 4, 4096).sigmas
    # 3 s / (1 + 2 s) at s = 3/4, 1/2, 1/4
    np.testing.assert_allclose(shifted, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-7)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_dynamic_shift_goes_through_the_given_points(tokens, mu):
    assert dynamic_shift(DEV, tokens) == pytest.approx(mu, abs=1e-12)
    middle = make_schedule(DEV, 2, tokens).sigmas[1]
    assert middle == pytest.approx(math.exp(mu) / (math.exp(mu) + 1), rel=1e-6)


def test_linear_shift_uses_mu_itself():
    linear = dataclasses.replace(DEV, time_shift_type="linear")
    assert make_schedule(linear, 2, 4096).sigmas[1] == pytest.approx(1.15 / 2.15, rel=1e-6)


@given(steps=st.integers(1, 200), tokens=st.integers(1, 65_536), dynamic=st.booleans())
def test_schedule_falls_from_noise_to_clean(steps, tokens, dynamic):
    schedule = make_schedule(DEV if dynamic else SCHNELL, steps, tokens)
    assert schedule.num_steps == steps
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float32
    assert schedule.sigmas[0] == 1.0
    assert schedule.sigmas[-1] == 0.0
    steps_down = np.diff(schedule.sigmas)
    assert (steps_down <= 0).all()
    if tokens <= 16_384:
        # Beyond 2048 x 2048 pixels the shift is so large that float32, in which diffusers computes
        # and we do, cannot tell the first levels from 1.
        assert (steps_down < 0).all()


def test_errors():
    with pytest.raises(UserError, match="num_inference_steps must be at least 1, got 0"):
        make_schedule(DEV, 0, 256)
    odd = dataclasses.replace(DEV, time_shift_type="cubic")
    with pytest.raises(UserError, match="'exponential' or 'linear', got 'cubic'"):
        make_schedule(odd, 4, 256)


def test_exact_velocity_leads_to_the_clean_image():
    """On a straight path every step predicts the clean image, and the last one arrives there."""
    random = np.random.default_rng(0)
    clean, noise = random.standard_normal((2, 1, 16, 8)).astype(np.float32)
    latents, velocity = jnp.asarray(noise), jnp.asarray(noise - clean)
    sigmas = make_schedule(DEV, 7, 4096).sigmas
    for sigma, sigma_next in zip(jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:]), strict=True):
        np.testing.assert_allclose(predict_clean(latents, velocity, sigma), clean, atol=1e-6)
        latents = euler_step(latents, velocity, sigma, sigma_next)
    np.testing.assert_allclose(latents, clean, atol=1e-6)
