"""One step of self-distillation: it learns, it repeats, and every way of running it agrees."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.heads import ProjectedHeads
from flux_jax.linears import linears, replace_linears
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat
from ternary.config import OPTIMIZERS, DistillConfig, QuantConfig, TrajectoryConfig
from ternary.distillation.optimizer import make_optimizer
from ternary.distillation.step import PromptSet, StepFunction, latent_names, pmap_step
from ternary.distillation.trajectory import Trajectories, split_pool
from ternary.layers import FakeTernaryLinear
from ternary.policy import Policy, select

pytestmark = pytest.mark.slow

FLUX = FluxConfig(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)
CONFIG = DistillConfig(
    steps=60, learning_rate=1e-3, warmup=2, compute_dtype="float32", block_loss=0.1
)


# A few layers of every kind of place: each one costs compile time.
SOME = Policy(include=("*img_attn*", "single_blocks.*"))


# Tests share what they need alike, and with it the compiled steps.
@functools.cache
def make_parts(config=CONFIG, *, batch=4, quant=None, axis_name=None, policy=SOME):
    """Step function, state, teacher's parameters, prompts."""
    teacher = FluxTransformer(FLUX, dtype=jnp.float32, rngs=nnx.Rngs(0))
    student = FluxTransformer(FLUX, dtype=jnp.float32, rngs=nnx.Rngs(0))
    names = select(list(linears(student)), policy)
    quant = quant or QuantConfig()
    replace_linears(student, names, lambda _, old: FakeTernaryLinear.from_linear(old, quant))
    trajectories = Trajectories(
        TrajectoryConfig(sampling_steps=(4, 6), groups=2),
        SchedulerConfig(),
        tokens=(4, FLUX.in_channels),
        batch_size=batch,
        prompts=5,
    )
    rng = np.random.default_rng(0)
    prompts = PromptSet(
        txt=jnp.asarray(rng.standard_normal((5, 3, FLUX.context_in_dim), np.float32)),
        pooled=jnp.asarray(rng.standard_normal((5, FLUX.vec_in_dim), np.float32)),
    )
    step = StepFunction(teacher, student, config, trajectories, axis_name=axis_name)
    _, teacher_params = split_flat(teacher)
    _, student_params = split_flat(student)
    return step, step.start(student_params), teacher_params, prompts


@functools.cache
def compile_step(step):
    return jax.jit(step)


def run(step, state, teacher, prompts, count):
    compiled = compile_step(step)
    losses = []
    for _ in range(count):
        state, metrics = compiled(state, teacher, prompts)
        losses.append(np.asarray(metrics.loss))
    return state, np.array(losses)


def loss_at(step, params, pool, teacher, prompts):
    """Mean loss of some parameters over all states of a pool."""
    losses = []
    for group in range(pool.x.shape[0]):
        states = step.trajectories.states(pool, jnp.int32(group))
        target = step.teacher_velocity(teacher, states, prompts)
        losses.append(float(step.loss(params, states, prompts, target)[0]))
    return np.mean(losses)


def test_the_student_comes_closer_to_its_teacher():
    """At the states it began with, and at those it has come to."""
    step, start, teacher, prompts = make_parts(batch=8, policy=Policy())
    start = start._replace(pool=jax.jit(step.spread)(start.pool, teacher, prompts))
    assert len(np.unique(np.asarray(start.pool.position))) > 2
    end, _ = run(step, start, teacher, prompts, CONFIG.steps)
    assert int(end.step) == CONFIG.steps
    for pool in (start.pool, end.pool):
        before = loss_at(step, start.params, pool, teacher, prompts)
        after = loss_at(step, end.params, pool, teacher, prompts)
        assert after < 0.7 * before


def test_training_is_left_to_xla(monkeypatch):
    """Which partitions and differentiates it; drawing takes kernels."""
    asked = []

    def listen(*, backend, **others):
        asked.append(backend)
        return ProjectedHeads(backend=backend, **others)

    monkeypatch.setattr("flux_jax.transformer.ProjectedHeads", listen)
    step, state, teacher, prompts = make_parts()
    jax.eval_shape(step, state, teacher, prompts)
    assert set(asked) == {"jax"}


def test_a_copy_of_the_state_goes_on_bit_for_bit():
    step, state, teacher, prompts = make_parts()
    _, whole = run(step, state, teacher, prompts, 6)
    half, first = run(step, state, teacher, prompts, 3)
    saved = jax.tree.map(np.asarray, half)
    _, second = run(step, jax.tree.map(jnp.asarray, saved), teacher, prompts, 3)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)


def test_accumulation_averages_groups():
    """Two groups of one step are the mean of the two groups' losses at the same weights."""
    config = dataclasses.replace(CONFIG, learning_rate=0.0)
    step, state, teacher, prompts = make_parts(config)
    _, apart = run(step, state, teacher, prompts, 2)
    twice, *_ = make_parts(dataclasses.replace(config, accumulate=2))
    _, together = run(twice, state, teacher, prompts, 1)
    np.testing.assert_allclose(together[0], apart.mean(), rtol=1e-6)


def test_accumulation_averages_gradients():
    """Whose size an optimiser may not show: AdamW's first step is of one length whatever it is."""
    step, state, teacher, prompts = make_parts()
    apart = [
        jax.jit(step._gradients)(state._replace(step=jnp.int32(group)), teacher, prompts)[0]
        for group in (0, 1)
    ]
    twice, *_ = make_parts(dataclasses.replace(CONFIG, accumulate=2))
    together, *_ = jax.jit(twice._gradients)(state, teacher, prompts)
    for name, value in together.items():
        mean = (apart[0][name] + apart[1][name]) / 2
        np.testing.assert_allclose(value, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [8, pytest.param(16, marks=pytest.mark.long)])
def test_remat_changes_nothing(bits):
    quant = QuantConfig(granularity="tensor", activation_bits=bits, learned_scale=True, rank=2)
    step, state, teacher, prompts = make_parts(quant=quant)
    _, plain = run(step, state, teacher, prompts, 3)
    again, *_ = make_parts(dataclasses.replace(CONFIG, remat=True), quant=quant)
    _, recomputed = run(again, state, teacher, prompts, 3)
    np.testing.assert_allclose(recomputed, plain, rtol=1e-5)


def test_jit_over_a_mesh_gives_the_same_losses():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    step, state, teacher, prompts = make_parts()
    _, alone = run(step, state, teacher, prompts, 4)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    state = jax.device_put(state, everywhere)
    state = state._replace(pool=jax.device_put(state.pool, split))
    _, spread = run(
        step, state, jax.device_put(teacher, everywhere), jax.device_put(prompts, everywhere), 4
    )
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


@pytest.mark.long
def test_pmap_gives_the_same_losses():
    """Two devices with the halves of every group, against one device with all of it.

    Long enough for trajectories to end and begin anew: the halves then draw other noise.
    """
    step, state, teacher, prompts = make_parts()
    _, alone = run(step, state, teacher, prompts, 13)
    half, *_ = make_parts(batch=2, axis_name="data")

    def two(tree):
        return jax.tree.map(lambda x: jnp.stack([x, x]), tree)

    both = two(state)._replace(pool=split_pool(state.pool, 2))
    train, inputs = pmap_step(half), (two(teacher), two(prompts))
    for expected in alone:
        both, metrics = train(both, *inputs)
        np.testing.assert_allclose(metrics.loss[0], expected, rtol=1e-4)
        np.testing.assert_array_equal(metrics.loss[0], metrics.loss[1])
    assert int(both.pool.started.min()) >= 1
    for value in both.params.values():
        np.testing.assert_array_equal(value[0], value[1])
    with pytest.raises(ValueError, match="a batch of 4 cannot be split over 3 devices"):
        split_pool(state.pool, 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_the_weights_and_small_ones_hold_little(name):
    config = dataclasses.replace(CONFIG, optimizer=name, ema=0.9)
    step, state, teacher, prompts = make_parts(config)
    after, losses = run(step, state, teacher, prompts, 3)
    assert np.isfinite(losses).all()
    moved = [np.abs(after.params[n] - state.params[n]).max() for n in state.params]
    assert np.median(moved) > 0
    key = "double_blocks.0.img_attn.qkv.weight"
    assert np.abs(after.ema[key] - after.params[key]).max() > 0
    weights = {"w": jnp.zeros((1024, 1024))}
    held = sum(x.nbytes for x in jax.tree.leaves(make_optimizer(config).init(weights)))
    limit = {"adamw": 2.01, "lion": 0.51, "adafactor": 0.01}[name]
    assert held <= limit * weights["w"].nbytes


def test_what_bf16_could_not_hold_stays_float32():
    """A learned scale is a logarithm; an average moves by less than bf16 can tell."""
    config = dataclasses.replace(CONFIG, master_dtype="bfloat16", ema=0.999)
    step, state, teacher, prompts = make_parts(config, quant=QuantConfig(learned_scale=True))
    kinds = {name: value.dtype.name for name, value in state.params.items()}
    scales = {name for name in kinds if name.endswith("log_scale")}
    assert scales
    assert {kinds[name] for name in scales} == {"float32"}
    assert {kinds[name] for name in kinds.keys() - scales} == {"bfloat16"}
    after, _ = run(step, state, teacher, prompts, 3)
    for name, value in after.params.items():
        assert value.dtype == kinds[name]
    # What is compiled for the first step is what the second one runs.
    for one, other in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    key = "double_blocks.0.img_attn.qkv.weight"
    moved = np.asarray(after.params[key] != state.params[key])
    assert moved.any()
    assert np.asarray(after.ema[key] != state.ema[key])[moved].mean() > 0.99


def test_latent_weights_keep_their_precision():
    step, state, *_ = make_parts(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    names = latent_names(step._student(state.params))
    assert "double_blocks.0.img_attn.qkv.weight" in names
    assert "single_blocks.0.linear1.bias" in names
    assert "img_in.weight" not in names
    assert "double_blocks.0.img_attn.norm.query_norm.scale" not in names
