"""A transformer's parts, streamed: the same velocity, and two parts on the device at a time."""

from __future__ import annotations

import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.configs import FluxConfig
from flux_jax.linears import linears
from flux_jax.rope import image_ids, rotary_angles, text_ids
from flux_jax.tree import to_flat
from ternary.calibration.block_training import PartPrograms, output_weights
from ternary.calibration.states import teacher_velocity
from ternary.calibration.streaming import (
    abstract_part,
    batches,
    part_name,
    parts_of,
    send,
    stream,
    take_rows,
)
from ternary.config import CalibrateConfig
from ternary.storage.saving import stored_layer
from tests.ternary.calibration.calibration_parts import (
    FLUX,
    QUANT,
    cached_programs,
    held_out,
    make,
    make_prompts,
    make_teacher,
    model_inputs,
)

pytestmark = pytest.mark.slow
_cached_programs = pytest.fixture(scope="module", autouse=True)(cached_programs)


@pytest.fixture(scope="module")
def calibrator(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "p")


@pytest.fixture(scope="module")
def samples(calibrator):
    return held_out(calibrator)


def test_streaming_gives_the_teachers_velocity(calibrator, samples):
    # A batch that does not divide the samples.
    weights = calibrator.weights
    found = teacher_velocity(weights, calibrator.programs, samples, calibrator.prompts, 5)
    expected = jax.jit(make_teacher())(*model_inputs(samples, make_prompts()))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_streams_on_the_host_and_on_the_device_agree(calibrator, samples, monkeypatch):
    arguments = (calibrator.weights, calibrator.programs, samples, calibrator.prompts, 8)
    there = teacher_velocity(*arguments)
    monkeypatch.setattr("ternary.calibration.states._DEVICE_BYTES", 0)
    np.testing.assert_array_equal(teacher_velocity(*arguments), there)


def test_parts_cover_every_parameter(calibrator):
    names = {
        part.prefix + name
        for part in calibrator.weights.parts
        for name in calibrator.weights.part(part)
    }
    assert names == set(to_flat(make_teacher()))
    assert part_name("double_blocks.12.img_mod.lin.weight") == "double_blocks.12"


def test_two_parts_are_there_at_a_time():
    """What was loaded for one part is gone before the next but one is loaded."""
    alive, most = set(), 0

    class Loaded:
        def __init__(self, part):
            nonlocal most
            self.part = part
            alive.add(part)
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(self.part)

    parts, used = parts_of(FLUX), []

    def use(part, loaded):
        used.append((part, loaded.part))
        deadline = time.monotonic() + 10
        while part != parts[-1] and len(alive) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)

    stream(parts, Loaded, use)
    assert used == [(part, part) for part in parts]
    assert most == 2


def test_parts_are_sent_to_the_callers_device(calibrator):
    """Also the one that a `with` chooses, which another thread does not see."""
    weights, found = calibrator.weights, set()

    def use(_, flat):
        for array in flat.values():
            found.update(array.devices())

    with jax.default_device(jax.devices()[2]):
        stream(weights.parts[:3], lambda part: send(weights.part(part)), use)
    assert found == {jax.devices()[2]}


def test_a_part_that_is_dropped_leaves_the_device(calibrator):
    """At once, not when the garbage collector comes by: there may be no room for another."""
    part = calibrator.weights.parts[1]
    layers = calibrator.plan.layers[part.name]

    def make_and_save():
        teacher = send(calibrator.weights.part(part))
        params = calibrator.programs.start(teacher, layers)
        for layer in layers:
            for _ in stored_layer(layer, calibrator.programs.layer(params, layer)):
                pass

    make_and_save()
    gc.collect()
    gc.disable()
    try:
        before = sum(array.nbytes for array in jax.live_arrays())
        make_and_save()
        assert sum(array.nbytes for array in jax.live_arrays()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["double_blocks.0", "single_blocks.0"])
def test_a_full_size_block_trains_in_12_gb(name):
    """FLUX.1-dev at 1024 x 1024, four samples a step, AdamW: planned by the compiler, not run."""
    config = FluxConfig.dev()
    part = next(part for part in parts_of(config) if part.name == name)
    ids = jnp.asarray(np.concatenate([text_ids(512), image_ids(64, 64)]))
    rotation = rotary_angles(ids, config.axes_dim, config.theta)
    calibrate = CalibrateConfig(batch_size=4, accumulate=4)
    programs = PartPrograms(config, QUANT, calibrate, rotation)
    dense = abstract_part(config, part.kind, jnp.bfloat16)
    planned = programs.step_bytes(part, list(linears(dense)), 4096, 512)
    weights = 4 * sum(int(np.prod(value.shape)) for value in to_flat(dense).values())
    # Weights, two moments and gradients at the least.
    assert 4 * weights < planned < 12e9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_rows_are_those_of_the_array(dtype):
    values = np.arange(24).reshape(4, 3, 2).astype(dtype)
    found = take_rows(values, np.array([2, 0, 2]))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[[2, 0, 2]])


def test_batches_are_filled_up():
    assert [list(rows) for rows in batches(5, 3)] == [[0, 1, 2], [3, 4, 4]]
    assert [list(rows) for rows in batches(3, 3)] == [[0, 1, 2]]


def test_accumulation_is_the_same_batch_in_parts(calibrator):
    """One step on eight samples, whole and two at a time."""
    part, rng = calibrator.weights.parts[-1], np.random.default_rng(0)
    width = FLUX.hidden_size
    inputs = {
        "img": rng.standard_normal((8, 6, width), np.float32),
        "vec": rng.standard_normal((8, width), np.float32),
    }
    targets = {"velocity": rng.standard_normal((8, 6, FLUX.in_channels), np.float32)}
    weights = output_weights(part, last_block=False)
    found = []
    for accumulate in (1, 4):
        config = CalibrateConfig(
            compute_dtype="float32", accumulate=accumulate, warmup=1, optimizer="lion"
        )
        programs = PartPrograms(FLUX, QUANT, config, calibrator.programs._rotation)
        start = programs.start(send(calibrator.weights.part(part)), ["linear"])
        state = start, programs.start_optimizer(start)
        losses = []
        for _ in range(3):
            state, loss = programs.step(part, ["linear"], state, inputs, targets, weights)
            losses.append(float(loss))
        found.append((losses, {name: np.asarray(value) for name, value in state[0].items()}))
    (one, whole), (other, parts) = found
    assert one[2] < one[0]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(value, parts[name], atol=1e-6, err_msg=name)


def test_moments_in_bf16_stay_so_where_gradients_are_summed_in_float32(calibrator):
    part, width = calibrator.weights.parts[-1], FLUX.hidden_size
    config = CalibrateConfig(batch_size=4, accumulate=2, master_dtype="bfloat16")
    programs = PartPrograms(FLUX, QUANT, config, calibrator.programs._rotation)
    params = programs.start(send(calibrator.weights.part(part)), ["linear"])
    state = params, programs.start_optimizer(params)
    inputs = {"img": jnp.zeros((4, 6, width)), "vec": jnp.zeros((4, width))}
    targets = {"velocity": jnp.ones((4, 6, FLUX.in_channels))}
    weights = output_weights(part, last_block=False)
    after, _ = jax.eval_shape(
        lambda *state: programs.step(part, ["linear"], state, inputs, targets, weights), *state
    )
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)] for x in (state, after)]
    assert kinds[0] == kinds[1]
