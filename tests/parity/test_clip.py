"""CLIP text encoder against transformers' `CLIPTextModel`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from convert.maps import clip as clip_map
from flux_jax.clip import CLIPTextEncoder
from flux_jax.configs import CLIPTextConfig
from tests.parity.common import TOLERANCE, load, ours, perturb_vectors, relative_error, run

EOS = 97
CONFIGS = {
    "tiny": CLIPTextConfig.tiny(),
    "gelu": CLIPTextConfig(
        vocab_size=100,
        hidden_size=72,
        intermediate_size=104,
        num_hidden_layers=4,
        num_attention_heads=3,
        max_position_embeddings=50,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        eos_token_id=EOS,
    ),
    "one_layer": CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=50,
    ),
}


def reference(config: CLIPTextConfig) -> transformers.CLIPTextModel:
    torch.manual_seed(0)
    theirs = transformers.CLIPTextConfig(**clip_map.config_to_hf(config))
    model = transformers.CLIPTextModel(theirs).eval()
    perturb_vectors(model, seed=1)
    return model


@pytest.fixture(scope="module", params=[(n, d) for n in CONFIGS for d in TOLERANCE], ids="-".join)
def models(request, tmp_path_factory):
    """Config, dtype, transformers' model and ours with the same weights."""
    name, dtype = request.param
    model = reference(CONFIGS[name])
    folder = tmp_path_factory.mktemp("clip")
    return CONFIGS[name], dtype, model, ours(model, "text_encoder", dtype, folder)


def token_ids(config: CLIPTextConfig, batch: int, length: int) -> np.ndarray:
    """Prompts that end at different places and are padded with their end token."""
    rng = np.random.default_rng(length)
    legacy = config.eos_token_id == 2
    end = config.vocab_size - 1 if legacy else config.eos_token_id
    ids = rng.integers(0, config.vocab_size - 5, (batch, length))
    for row, stop in enumerate(rng.integers(0, length, batch)):
        ids[row, stop:] = end
    if not legacy:
        ids[0, 0] = config.vocab_size - 1  # a larger id than the end's, which must not be taken
    return ids


def layer_by_layer(encoder: CLIPTextEncoder, ids):
    """The stream before each block and after the last."""
    streams = [encoder.embed(ids)]
    for block in encoder.blocks:
        streams.append(block(streams[-1]))
    return streams


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (4, 49)])
def test_every_layer(models, batch, length):
    config, dtype, model, ours = models
    ids = token_ids(config, batch, length)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids), output_hidden_states=True)
    streams = run(layer_by_layer, ours, ids)
    for stream, expected in zip(streams, theirs.hidden_states, strict=True):
        assert relative_error(stream, expected) <= TOLERANCE[dtype]
    whole = run(CLIPTextEncoder.__call__, ours, ids)
    assert whole.pooled.dtype == dtype
    assert relative_error(whole.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE[dtype]
    assert relative_error(whole.pooled, theirs.pooler_output) <= TOLERANCE[dtype]


def test_names_with_and_without_the_prefix_give_the_same_model(tmp_path):
    reference(CONFIGS["gelu"]).save_pretrained(tmp_path)
    ids = token_ids(CONFIGS["gelu"], 2, 9)
    outputs = []
    for prefix in ("", "text_model."):
        tensors = {
            prefix + name.removeprefix("text_model."): value
            for name, value in load_file(tmp_path / "model.safetensors").items()
        }
        # Older files hold the positions, too.
        tensors[prefix + "embeddings.position_ids"] = np.arange(50)[None]
        save_file(tensors, tmp_path / "model.safetensors")
        encoder = load(tmp_path, "text_encoder", "float32")
        outputs.append(run(CLIPTextEncoder.__call__, encoder, ids).pooled)
    np.testing.assert_array_equal(*outputs)


def test_a_config_goes_both_ways():
    theirs = transformers.CLIPTextConfig(**clip_map.config_to_hf(CONFIGS["gelu"]))
    assert clip_map.config_from_hf(theirs.to_dict()) == CONFIGS["gelu"]
