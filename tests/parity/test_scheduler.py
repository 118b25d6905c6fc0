"""Noise schedule and Euler step against diffusers' `FlowMatchEulerDiscreteScheduler`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from flux_jax.configs import SchedulerConfig
from flux_jax.scheduler import euler_step, make_schedule

CONFIGS = {
    "dev": SchedulerConfig.dev(),
    "schnell": SchedulerConfig.schnell(),
    "constant": SchedulerConfig(use_dynamic_shifting=False, shift=3.0),
    "linear": SchedulerConfig(time_shift_type="linear"),
}


def reference(config: SchedulerConfig, steps: int, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler, set as its `FluxPipeline` sets it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**dataclasses.asdict(config))
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("steps", "tokens"), [(1, 64), (4, 4096), (28, 4096), (50, 9216)])
def test_sigmas(name, steps, tokens):
    ours = make_schedule(CONFIGS[name], steps, tokens)
    theirs = reference(CONFIGS[name], steps, tokens)
    # The same float32 operations in the same order: the same bits.
    np.testing.assert_array_equal(ours.sigmas, theirs.sigmas.numpy())
    np.testing.assert_array_equal(ours.timesteps, (theirs.timesteps / 1000).numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_steps(name):
    steps, tokens = 7, 1024
    schedule, theirs = (make(CONFIGS[name], steps, tokens) for make in (make_schedule, reference))
    theirs.set_begin_index(0)
    random = np.random.default_rng(0)
    start = random.standard_normal((2, 16, 8)).astype(np.float32)
    ours, expected = jnp.asarray(start), torch.from_numpy(start)
    for step in range(steps):
        velocity = random.standard_normal(start.shape).astype(np.float32)
        ours = euler_step(
            ours,
            jnp.asarray(velocity),
            jnp.asarray(schedule.sigmas[step]),
            jnp.asarray(schedule.sigmas[step + 1]),
        )
        timestep = theirs.timesteps[step]
        expected = theirs.step(torch.from_numpy(velocity), timestep, expected, return_dict=False)[0]
        # One rounding of values of about 3: at most 2^-22 a step.
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
