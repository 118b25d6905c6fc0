"""A small teacher with its prompts, and a calibration of it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.rope import image_ids, text_ids
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat, to_flat
from ternary.calibration.calibrator import Calibrator
from ternary.calibration.progress import Progress
from ternary.calibration.states import draw_samples
from ternary.calibration.streaming import HostWeights
from ternary.config import CalibrateConfig, QuantConfig
from ternary.distillation.step import PromptSet
from ternary.policy import Policy

FLUX = FluxConfig(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)
GRID, WORDS = (2, 3), 3
CONFIG = CalibrateConfig(
    samples=22,
    states_each=3,
    sampling_steps=6,
    steps=40,
    batch_size=8,
    learning_rate=2e-3,
    warmup=2,
    compute_dtype="float32",
)
QUANT = QuantConfig()


@functools.cache
def make_teacher():
    return FluxTransformer(FLUX, dtype=jnp.float32, rngs=nnx.Rngs(0))


@functools.cache
def make_weights():
    flat = to_flat(make_teacher())
    return HostWeights(FLUX, {name: np.array(value) for name, value in flat.items()})


@functools.cache
def make_prompts():
    rng = np.random.default_rng(0)
    return PromptSet(
        txt=jnp.asarray(rng.standard_normal((5, WORDS, FLUX.context_in_dim), np.float32)),
        pooled=jnp.asarray(rng.standard_normal((5, FLUX.vec_in_dim), np.float32)),
    )


def make(folder, weights=None, prompts=None, *, config=CONFIG, quant=QUANT, policy=None):
    """A calibration whose finished parts go to `folder`."""
    progress = Progress(folder, dataclasses.asdict(config))
    weights, prompts = weights or make_weights(), prompts or make_prompts()
    policy = policy or Policy()
    scheduler = SchedulerConfig()
    return Calibrator(weights, scheduler, prompts, GRID, quant, policy, config, progress)


def held_out(calibrator, seed=7):
    """States that the calibration has not seen."""
    config = dataclasses.replace(CONFIG, seed=seed)
    return draw_samples(
        calibrator.weights,
        calibrator.programs,
        calibrator.scheduler,
        calibrator.prompts,
        GRID,
        config,
    )


def cached_programs():
    """Programs that compile in less than a second go to the tests' cache too."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    yield
    jax.config.update(name, before)


def model_inputs(samples, prompts):
    """Arguments of `FluxTransformer.__call__`."""
    txt, pooled = (jnp.asarray(x)[samples.prompt] for x in prompts)
    ids = jnp.asarray(image_ids(*GRID)), jnp.asarray(text_ids(WORDS))
    return (
        jnp.asarray(samples.x),
        ids[0],
        txt,
        ids[1],
        jnp.asarray(samples.sigma),
        pooled,
        jnp.asarray(samples.guidance),
    )


def run_model(model, samples, prompts):
    """Velocity, and the blocks' outputs, text first."""
    rebuild, flat = split_flat(model)

    @jax.jit
    def run(flat, x, ids, txt, words, sigma, pooled, guidance):
        module, outputs = rebuild(flat), []
        mods = module.modulations(module.conditioning(sigma, pooled, guidance))
        velocity = module.velocity(x, ids, txt, words, mods, on_block=outputs.append)
        return velocity, outputs

    velocity, outputs = run(flat, *model_inputs(samples, prompts))
    return np.asarray(velocity), [np.asarray(output) for output in outputs]
