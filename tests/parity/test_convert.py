"""Exported folders load with diffusers and transformers, with the weights that went in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from convert.engine import convert
from flux_jax.checkpoint import load_checkpoint
from flux_jax.tree import to_flat
from tests.convert.models import CONFIGS, diffusers_folder, random_parameters, stored_tensors

CLASSES = {
    "transformer": FluxTransformer2DModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "vae": AutoencoderKL,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Random weights, through a Flax checkpoint, to a diffusers folder."""
    root = tmp_path_factory.mktemp("models")
    diffusers_folder(root / "before", shard_bytes=2_000_000)
    convert(root / "before", root / "flax", dtype="keep")
    convert(root / "flax", root / "after", to="diffusers", dtype="keep", shard_bytes=2_000_000)
    return root / "after"


@pytest.mark.parametrize("name", CLASSES)
def test_the_reference_loads_an_exported_component(exported, name):
    options = {"torch_dtype": torch.bfloat16} if name in ("transformer", "vae") else {}
    model, report = CLASSES[name].from_pretrained(
        exported / name, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = stored_tensors(name, random_parameters(name), "diffusers")
    state = model.state_dict()
    for key, array in expected.items():
        ours = state.get(key, state.get(key.removeprefix("text_model.")))
        assert ours is not None, key
        assert ours.dtype == torch.bfloat16
        bits = ours.contiguous().view(torch.int16).numpy()
        np.testing.assert_array_equal(bits, array.view(np.int16))


def test_the_reference_reads_the_schedule(exported):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(exported / "scheduler")
    assert scheduler.config.max_shift == 1.25
    assert scheduler.config.use_dynamic_shifting


@pytest.mark.parametrize("name", CLASSES)
def test_we_load_what_the_reference_saves(tmp_path, exported, name):
    """Whatever names this version writes (transformers 5 has none of CLIP's prefixes)."""
    options = {"torch_dtype": torch.bfloat16} if name in ("transformer", "vae") else {}
    model = CLASSES[name].from_pretrained(exported / name, local_files_only=True, **options)
    model.save_pretrained(tmp_path / "saved", max_shard_size="2MB")
    checkpoint = load_checkpoint(tmp_path / "saved")
    assert checkpoint.configs[name] == CONFIGS[name]
    found = to_flat(checkpoint.modules[name])
    for key, array in random_parameters(name).items():
        assert found[key].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[key], array)
