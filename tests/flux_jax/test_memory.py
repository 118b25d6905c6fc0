"""Memory known beforehand: weights counted exactly, work growing with the image."""

from __future__ import annotations

import json

import jax
import pytest
from typer.testing import CliRunner

from flux_jax.cli import app
from flux_jax.components import abstract_module
from flux_jax.configs import SchedulerConfig
from flux_jax.memory import stage_memory
from flux_jax.plan import make_plan
from tests.small_pipeline import CONFIGS, TRANSFORMER, VAE


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
    assert small["denoise"].peak == small["denoise"].weights + small["denoise"].work


def test_work_grows_with_the_image_and_the_batch(small):
    larger, batched = needs(128), needs(64, batch_size=2)
    for stage in ("denoise", "decode"):
        # Four times the pixels, or twice; the attention's part grows faster, fixed parts not.
        assert 2 * small[stage].work < larger[stage].work
        assert 1.2 * small[stage].work < batched[stage].work
    assert larger["encode (T5)"] == small["encode (T5)"]
    # The decoder's values at full resolution alone: 8 channels of float32.
    assert small["decode"].work > 64 * 64 * 8 * 4


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
