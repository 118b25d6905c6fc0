"""Training a LoRA beside bf16 and packed weights, in a few steps."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from examples.tiny_flux import style
from flux_jax.checkpoint import load_lora
from flux_jax.linears import linears
from flux_jax.lora import LoRALinear
from flux_jax.pipeline import FluxPipeline
from flux_jax.tree import to_flat
from ternary.layers import TernaryLinear


def test_a_new_lora_changes_nothing_yet():
    pipe = FluxPipeline.from_pretrained("tiny")
    lora = style.new_lora(pipe.transformer.config, 4)
    # Of three double blocks eight linears each, of six single ones two.
    assert len(lora.layers) == 3 * 8 + 6 * 2
    assert all(change.a.any() and not change.b.any() for change in lora.layers.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny-ternary"])
def test_only_the_factors_are_trained(model, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "SCENES", 8)
    monkeypatch.setattr(style, "ENCODED", 4)
    pipe = FluxPipeline.from_pretrained(model)
    before = {name: np.asarray(value) for name, value in to_flat(pipe.transformer).items()}
    pipe.add_lora(style.new_lora(pipe.transformer.config, 4))
    style.train(pipe, steps=2, batch_size=2, learning_rate=1e-2)
    found = linears(pipe.transformer, LoRALinear)
    assert (TernaryLinear in {type(x.base) for x in found.values()}) == (model == "tiny-ternary")
    pipe.save_lora(tmp_path / "night.safetensors")
    stored = load_lora(tmp_path / "night.safetensors", pipe.transformer.config)
    assert stored.layers.keys() == found.keys()
    assert all(change.b.any() for change in stored.layers.values())
    pipe.unload_loras()
    after = to_flat(pipe.transformer)
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(np.asarray(after[name]), value)


def test_a_file_that_is_there_is_kept(tmp_path):
    path = tmp_path / "night.safetensors"
    path.write_bytes(b"mine")
    import typer

    app = typer.Typer()
    app.command()(style.main)
    told = CliRunner().invoke(app, ["--out", str(path)])
    assert told.exit_code == 2
    assert "exists: --force replaces it" in told.output
    assert path.read_bytes() == b"mine"
