"""T5 encoder against transformers' `T5EncoderModel`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from convert.maps import t5 as t5_map
from flux_jax.configs import T5Config
from flux_jax.t5 import T5Encoder, position_bias, relative_buckets
from tests.parity.common import TOLERANCE, ours, perturb_vectors, relative_error, run

CONFIGS = {
    "tiny": T5Config.tiny(),
    "odd": T5Config(
        vocab_size=99,
        d_model=72,
        d_kv=24,
        d_ff=104,
        num_layers=4,
        num_heads=5,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
        layer_norm_epsilon=1e-5,
    ),
    "one_layer": T5Config(vocab_size=33, d_model=64, d_kv=64, d_ff=48, num_layers=1, num_heads=1),
}


@pytest.fixture(scope="module", params=[(n, d) for n in CONFIGS for d in TOLERANCE], ids="-".join)
def models(request, tmp_path_factory):
    """Config, dtype, transformers' model and ours with the same weights."""
    name, dtype = request.param
    torch.manual_seed(0)
    theirs = transformers.T5Config(**t5_map.config_to_hf(CONFIGS[name]))
    model = transformers.T5EncoderModel(theirs).eval()
    perturb_vectors(model, seed=1)
    folder = tmp_path_factory.mktemp("t5")
    return CONFIGS[name], dtype, model, ours(model, "text_encoder_2", dtype, folder)


def layer_by_layer(encoder: T5Encoder, ids):
    """The stream before each block, and the output."""
    bias = position_bias(encoder.relative_attention_bias, encoder.config, ids.shape[1])
    streams = [encoder.token_embedding(ids)]
    for block in encoder.blocks:
        streams.append(block(streams[-1], bias))
    return streams[:-1], encoder.final_norm(streams[-1])


@pytest.mark.parametrize(("batch", "length"), [(2, 1), (3, 149)])
def test_every_layer(models, batch, length):
    config, dtype, model, ours = models
    ids = np.random.default_rng(length).integers(0, config.vocab_size, (batch, length))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids), output_hidden_states=True)
    streams, out = run(layer_by_layer, ours, ids)
    # transformers' last hidden state is normed; the others are the streams before the blocks.
    for stream, expected in zip(streams, theirs.hidden_states[:-1], strict=True):
        assert relative_error(stream, expected) <= TOLERANCE[dtype]
    whole = run(T5Encoder.__call__, ours, ids)
    assert whole.dtype == dtype
    assert relative_error(whole, theirs.last_hidden_state) <= TOLERANCE[dtype]
    assert relative_error(out, whole) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (64, 256), (8, 20)])
def test_relative_buckets_are_those_of_transformers(num_buckets, max_distance):
    length = 1200
    position = torch.arange(-(length - 1), length)
    expected = T5Attention._relative_position_bucket(
        position, bidirectional=True, num_buckets=num_buckets, max_distance=max_distance
    )
    ours = relative_buckets(length, num_buckets, max_distance)
    np.testing.assert_array_equal(ours, expected.numpy())


def test_a_config_goes_both_ways():
    theirs = transformers.T5Config(**t5_map.config_to_hf(CONFIGS["odd"]))
    assert t5_map.config_from_hf(theirs.to_dict()) == CONFIGS["odd"]
