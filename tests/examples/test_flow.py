"""Flow matching: what is drawn for a step, the learning rate, and a few steps at toy size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy.special import logit
from scipy.stats import norm

from examples.tiny_flux.flow import Captioned, FlowTrainer, FlowTraining, draw_times, trapezoid
from flux_jax.configs import CLIPTextConfig, FluxConfig, T5Config

T5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
CLIP = CLIPTextConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=5,
    eos_token_id=15,
)
FLUX = FluxConfig(
    in_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=16,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
)
SETTINGS = FlowTraining(batch_size=32, drop_caption=0.25)
ROWS = 6


def captioned() -> Captioned:
    """Six scenes of four image tokens, each with a caption of its own."""
    rng = np.random.default_rng(0)
    words = np.arange(ROWS, dtype=np.int16)[:, None] + 2
    return Captioned(
        latents=jnp.asarray(rng.standard_normal((ROWS, 4, 8)), jnp.bfloat16),
        t5_ids=jnp.asarray(np.tile(words, (1, 3))),
        clip_ids=jnp.asarray(np.concatenate([np.tile(words, (1, 4)), words * 0 + 15], axis=1)),
        empty_t5_ids=jnp.asarray([1, 0, 0], jnp.int16),
        empty_clip_ids=jnp.asarray([14, 15, 15, 15, 15], jnp.int16),
    )


@pytest.fixture(scope="module")
def trainer() -> FlowTrainer:
    """On two of the test run's devices, so that the batch really is split."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    return FlowTrainer(SETTINGS, (T5, CLIP, FLUX), mesh, seed=0)


def test_times_have_the_stated_distribution():
    """Four fifths logit-normal about log(shift), one fifth uniform: the share below some levels."""
    shift, count = 1.6, 200_000
    times = np.asarray(draw_times(jax.random.key(0), count, shift))
    assert 0 < times.min()
    assert times.max() < 1
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = 0.8 * norm.cdf(logit(level) - np.log(shift)) + 0.2 * level
        # Five standard deviations of a share of 200 000.
        assert abs((times < level).mean() - expected) < 5 * 0.5 / np.sqrt(count)


def test_trapezoid():
    rates = np.array([trapezoid(2.0, step, 100, 10, 0.4) for step in range(1, 101)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    np.testing.assert_allclose(rates[9:60], 2.0)
    np.testing.assert_allclose(rates[59:], np.linspace(2.0, 0.0, 41))
    # No warm-up and no decay: constant to the last step but one.
    assert {trapezoid(2.0, step, 5, 0, 0.0) for step in range(1, 5)} == {2.0}


def test_a_batch_mixes_noise_into_scenes_with_their_captions(trainer):
    data = captioned()
    (t5_ids, clip_ids), noisy, target, times, _ = trainer._batch(data, jnp.int32(3))
    # noisy = (1 - t) clean + t noise and target = noise - clean.
    clean = np.asarray(noisy - times[:, None, None] * target)
    scenes = np.asarray(data.latents, np.float32)
    distance = np.abs(clean[:, None] - scenes[None]).max(axis=(2, 3))
    rows = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-5
    assert len(set(rows)) > 3
    dropped = np.asarray(t5_ids)[:, 0] == 1
    assert 0 < dropped.sum() < 16
    for ids, all_ids, empty in (
        (t5_ids, data.t5_ids, data.empty_t5_ids),
        (clip_ids, data.clip_ids, data.empty_clip_ids),
    ):
        expected = np.where(dropped[:, None], np.asarray(empty), np.asarray(all_ids)[rows])
        np.testing.assert_array_equal(ids, expected)
    noise = np.asarray(target) + clean
    assert abs(noise.std() - 1) < 0.1
    other = trainer._batch(data, jnp.int32(4))[3]
    assert not np.array_equal(other, times)


@pytest.mark.long
def test_both_phases_learn(trainer):
    data = captioned()
    with pytest.raises(ValueError, match="call start_guidance"):
        trainer.guidance_step(data, 0, 0.1)
    start = jax.tree.map(np.asarray, trainer.params)
    losses = [float(trainer.step(data, 0, 3e-3))]
    # The average after the first update: a tenth of what it was.
    for name, value in trainer.params.items():
        expected = 0.1 * start[name] + 0.9 * np.asarray(value)
        np.testing.assert_allclose(trainer.ema[name], expected, rtol=1e-5, atol=1e-6)
    losses += [float(trainer.step(data, step, 3e-3)) for step in range(1, 100)]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    unmoved = [k for k, v in trainer.params.items() if np.array_equal(v, start[k])]
    assert unmoved == []

    trainer.start_guidance()
    teacher = jax.tree.map(np.asarray, trainer.teacher)
    losses = [float(trainer.guidance_step(data, 100 + step, 1e-3)) for step in range(60)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    jax.tree.map(np.testing.assert_array_equal, teacher, trainer.teacher)
