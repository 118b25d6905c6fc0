"""A training run's folder becomes one that diffusers' `FluxPipeline` loads."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from examples.tiny_flux import export
from examples.tiny_flux.run_files import save_parts
from examples.tiny_flux.train import component_configs
from flux_jax.configs import AutoencoderConfig
from flux_jax.tree import to_flat
from tests.random_module import random_module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose weights are random."""
    folder = tmp_path_factory.mktemp("run")
    t5, clip, flux = component_configs()
    vae = dataclasses.replace(AutoencoderConfig.tiny(), shift_factor=0.25, scaling_factor=1.5)
    flow = {}
    parts = {"transformer": flux, "text_encoder": clip, "text_encoder_2": t5}
    for seed, (name, config) in enumerate(parts.items()):
        weights = to_flat(random_module(name, config, jnp.float32, seed))
        flow |= {f"{name}.{key}": value for key, value in weights.items()}
    save_parts(folder, "flow", flow)
    weights = to_flat(random_module("vae", vae, jnp.float32, 3))
    save_file({k: np.asarray(v) for k, v in weights.items()}, folder / "autoencoder.safetensors")
    (folder / "autoencoder.json").write_text(json.dumps(dataclasses.asdict(vae)))
    return folder


def command(*arguments: object):
    app = typer.Typer()
    app.command()(export.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_is_a_diffusers_pipeline(run, tmp_path):
    out = tmp_path / "tiny"
    result = command(run, out)
    assert result.exit_code == 0, result.output
    assert max(path.stat().st_size for path in out.rglob("*")) < 16e6
    pipe = diffusers.FluxPipeline.from_pretrained(out).to(torch.float32)
    assert pipe.vae.config.shift_factor == 0.25
    assert pipe.vae.config.scaling_factor == 1.5
    assert pipe.scheduler.config.base_image_seq_len == 64
    flow = export.load_parts(run, "flow")
    stored = pipe.transformer.x_embedder.weight.detach().numpy()
    expected = flow["transformer.img_in.weight"].astype(np.float32)
    np.testing.assert_array_equal(stored, expected)
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id
    assert pipe.text_encoder_2.config.vocab_size == len(pipe.tokenizer_2)


def test_export_names_a_missing_weight(run, tmp_path):
    flow = export.load_parts(run, "flow")
    del flow["transformer.img_in.weight"]
    save_parts(tmp_path, "flow", {k: jnp.asarray(v) for k, v in flow.items()})
    for name in ("autoencoder.safetensors", "autoencoder.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    result = command(tmp_path, tmp_path / "out")
    assert result.exit_code == 2
    assert "FluxTransformer: the run and the model differ in ['img_in.weight']" in result.stderr
    assert not (tmp_path / "out").exists()
