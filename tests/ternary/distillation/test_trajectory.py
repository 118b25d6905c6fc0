"""Trajectories: where states come from, and that each is the sampler's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.configs import SchedulerConfig
from flux_jax.scheduler import make_schedule
from ternary.config import TrajectoryConfig
from ternary.distillation.trajectory import Trajectories

TOKENS = (4, 6)


def make(**settings):
    config = TrajectoryConfig(**{"sampling_steps": (3, 5), "groups": 2, **settings})
    return Trajectories(config, SchedulerConfig(), tokens=TOKENS, batch_size=8, prompts=10)


def test_a_pool_starts_as_noise_at_time_one():
    pool = make().start(3)
    assert pool.x.shape == (2, 8, *TOKENS)
    assert abs(float(jnp.std(pool.x)) - 1.0) < 0.15
    assert len(np.unique(np.asarray(pool.x[..., 0, 0]))) == 16
    states = make().states(pool, jnp.int32(1))
    np.testing.assert_array_equal(states.sigma, np.ones(8))
    assert (np.asarray(states.guidance) >= 1.0).all()
    assert (np.asarray(states.guidance) <= 5.0).all()


def test_the_draws_fill_their_ranges():
    pool = make(groups=16, guidance=(2.0, 4.0), on_policy=0.25).start(3)
    guidance = np.sort(np.asarray(pool.guidance).ravel())
    np.testing.assert_allclose(guidance, np.linspace(2.0, 4.0, guidance.size), atol=0.3)
    assert set(np.asarray(pool.prompt).ravel()) == set(range(10))
    assert set(np.asarray(pool.schedule).ravel()) == {0, 1}
    assert abs(float(pool.on_policy.mean()) - 0.25) < 0.1


def test_a_trajectory_is_the_samplers_and_then_another_begins():
    """With the velocity of a straight line to a point, Euler's method ends at the point."""
    rules = make(on_policy=0.0)
    pool = rules.start(3)
    noise = np.asarray(pool.x[0])
    target = np.full(TOKENS, 0.25, np.float32)
    lengths = np.asarray(rules.lengths)[np.asarray(pool.schedule[0])]
    advance = jax.jit(rules.advance)
    for step in range(1, 6):
        states = rules.states(pool, jnp.int32(0))
        schedule = make_schedule(SchedulerConfig(), 3, TOKENS[0])
        short = (lengths == 3) & (np.asarray(pool.started[0]) == 0)
        if step <= 3:
            np.testing.assert_array_equal(
                np.asarray(states.sigma)[short], np.float32(schedule.sigmas[step - 1])
            )
        before = pool
        line = jnp.asarray(noise - target)
        pool = advance(pool, jnp.int32(0), line, jnp.zeros_like(line))
        for row in np.flatnonzero(lengths == step):
            # It took its last step, so new noise with another draw is in its place.
            assert int(pool.started[0, row]) == 1
            assert int(pool.position[0, row]) == 0
            end = np.asarray(states.x[row] - states.sigma[row] * line[row])
            np.testing.assert_allclose(end, target, atol=1e-5)
            assert not np.allclose(pool.x[0, row], noise[row])
        for row in np.flatnonzero(lengths > step):
            assert int(pool.started[0, row]) == 0
        np.testing.assert_array_equal(pool.x[1], before.x[1])


def test_on_policy_follows_the_student():
    pools = {share: make(on_policy=share).start(3) for share in (0.0, 1.0)}
    ones = jnp.ones((8, *TOKENS))
    for share, pool in pools.items():
        moved = make(on_policy=share).advance(pool, jnp.int32(1), ones, -ones)
        states = make().states(pool, jnp.int32(1))
        sign = -1.0 if share else 1.0
        expected = pool.x[1] + sign * (states.sigma_next - states.sigma)[:, None, None]
        np.testing.assert_allclose(moved.x[1], expected, atol=1e-6)


def test_moving_holds_the_others_still():
    rules = make()
    pool = rules.start(3)
    moving = jnp.arange(8) < 3
    ones = jnp.ones((8, *TOKENS))
    moved = rules.advance(pool, jnp.int32(0), ones, ones, moving)
    np.testing.assert_array_equal(moved.position[0], np.where(np.arange(8) < 3, 1, 0))
    np.testing.assert_array_equal(moved.x[0, 3:], pool.x[0, 3:])


def test_stagger_meets_every_time():
    rules = make(groups=8)
    assert set(np.asarray(rules.stagger(rules.start(3))).ravel()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("lengths", [(20,), (28,), (20, 28), (8,), (50,), (1,)])
@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_every_group_is_spread_over_the_whole_of_its_trajectories(lengths, batch_size):
    """Trajectories of one length stay as far apart as they begin: a group sees no more, ever."""
    config = TrajectoryConfig(sampling_steps=lengths, groups=8)
    rules = Trajectories(
        config, SchedulerConfig(), tokens=TOKENS, batch_size=batch_size, prompts=10
    )
    pool = rules.start(3)
    reached = np.asarray(rules.stagger(pool))
    length = np.asarray(rules.lengths)[np.asarray(pool.schedule)]
    assert (reached >= 0).all()
    assert (reached < length).all()
    for group in np.sort(reached / length):
        gaps = np.diff(group, append=group[0] + 1)
        # The golden ratio's largest gap is 1.9 of the mean one; rounding adds a step.
        assert gaps.max() <= 1.9 / batch_size + 1 / min(lengths)
