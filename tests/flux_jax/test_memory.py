"""Memory known beforehand: weights counted exactly, work growing with the image."""

from __future__ import annotations

import gc
import json

import jax
import pytest
from typer.testing import CliRunner

from flux_jax.cli import app
from flux_jax.components import abstract_module
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.memory import stage_memory
from flux_jax.plan import make_plan
from flux_jax.residence import modulation_layers
from tests.small_pipeline import CONFIGS, TRANSFORMER, VAE, small_pipeline


def needs(size: int, batch_size: int = 1, **options):
    plan = make_plan(
        TRANSFORMER,
        VAE,
        SchedulerConfig.dev(),
        token_limit=12,
        height=size,
        width=size,
        num_inference_steps=4,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        max_sequence_length=None,
        batch_size=batch_size,
        num_images_per_prompt=1,
    )
    models = {name: abstract_module(name, config, "float32") for name, config in CONFIGS.items()}
    return stage_memory(models, plan, **options)


@pytest.fixture(scope="module")
def small():
    return needs(64)


def test_weights_are_the_components(small, pipe):
    def size(module):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(module))

    assert small["denoise"].weights == size(pipe.transformer)
    assert small["decode"].weights == size(pipe.vae)
    for need in small.values():
        assert need.peak == need.weights + need.work + need.held
    # Encoded prompts wait beside the weights of whatever is not at work.
    assert 0 <= small["decode"].held - size(pipe.transformer) < 10_000
    assert 0 <= small["denoise"].held - size(pipe.vae) < 10_000


def test_work_grows_with_the_image_and_the_batch(small):
    larger, batched = needs(128), needs(64, batch_size=2)
    for stage in ("denoise", "decode"):
        # Four times the pixels, or twice; the attention's part grows faster, fixed parts not.
        assert 2 * small[stage].work < larger[stage].work
        assert 1.2 * small[stage].work < batched[stage].work
    assert larger["encode (T5)"] == small["encode (T5)"]
    # The decoder's values at full resolution alone: 8 channels of float32.
    assert small["decode"].work > 64 * 64 * 8 * 4


def test_placements_are_planned(small, pipe):
    def size(module):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(module))

    resident, away = needs(64, text_encoders="resident"), needs(64, offload_modulation=True)
    text = size(pipe.text_encoders.text_encoder) + size(pipe.text_encoders.text_encoder_2)
    for stage in ("modulations", "denoise", "decode"):
        assert resident[stage].peak - small[stage].peak == text, stage
    layers = sum(size(layer) for layer in modulation_layers(pipe.transformer))
    for stage in ("denoise", "decode", "encode (T5)"):
        assert small[stage].peak - away[stage].peak == layers, stage
    assert small["modulations"] == away["modulations"]
    block = size(pipe.text_encoders.text_encoder_2.blocks[0])
    assert 0 <= small["encode (T5)"].weights - 2 * block < 1_000
    with pytest.raises(UserError, match="text_encoders must be one of resident, offloaded"):
        needs(64, text_encoders="auto")


@pytest.mark.parametrize("offload_modulation", [False, True])
def test_live_arrays_stay_below_the_plan(offload_modulation):
    """At every hand-over: no stage keeps what belongs to another."""
    planned = needs(
        32, text_encoders="streamed", offload_modulation=offload_modulation, tiled=False
    )
    gc.collect()
    gc.disable()
    before = {id(array) for array in jax.live_arrays()}

    def live():
        return sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)

    try:
        pipe = small_pipeline(placement="streamed", offload_modulation=offload_modulation)
        gc.collect()  # of making random modules
        found = {"decode": live()}
        options = {"seed": 0, "height": 32, "width": 32, "progress": False}
        encoded = pipe.encode_prompt("a red circle")
        found["encode (T5)"] = live()
        steps = []
        pipe(encoded, num_inference_steps=4, callback=lambda *_: steps.append(live()), **options)
        found["denoise"] = max(steps)
        left = live()
    finally:
        gc.enable()
    embeds = encoded.prompt_embeds.nbytes + encoded.pooled_prompt_embeds.nbytes
    assert left == found["decode"] + embeds
    for stage, nbytes in found.items():
        assert nbytes <= planned[stage].peak, stage
    # Not by much: what is planned beside the work of the compiled step is really there.
    step = planned["denoise"]
    assert step.weights + step.held < found["denoise"] + 10_000


def test_tiles_bound_the_decoder():
    whole, tiled = (needs(1024, tiled=tiled)["decode"].work for tiled in (False, True))
    assert 3 * tiled < whole


def test_a_ternary_transformer_is_planned_as_it_is_loaded():
    """Two bits a weight on the device, not the sixteen that they stand for."""
    report = {}
    for name in ("tiny", "tiny-ternary"):
        result = CliRunner().invoke(app, ["info", name, "--memory", "--json"])
        assert result.exit_code == 0, result.output
        report[name] = json.loads(result.stdout)["memory"]["stages"]["denoise"]["weights"]
    assert 6.0 < report["tiny"] / report["tiny-ternary"] < 8.0
