"""Fingerprints: equal for equal weights, whatever they are kept as, and for no others."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax import fingerprint
from flux_jax.linears import replace_linears
from ternary.config import QuantConfig
from ternary.layers import TernaryLinear
from tests.small_pipeline import small_pipeline


def test_fingerprint_tells_weights_apart(pipe):
    assert pipe.fingerprint() == small_pipeline().fingerprint()
    assert pipe.fingerprint() != small_pipeline(seed=1).fingerprint()
    # One weight in one component, and the order of two equal sums.
    changed = small_pipeline()
    bias = changed.vae.decoder.conv_out.bias
    bias.set_value(bias.get_value()[::-1])
    assert pipe.fingerprint() != changed.fingerprint()


def test_fingerprint_tells_settings_apart(pipe):
    """What changes a picture though every weight is the same."""
    changed = [small_pipeline() for _ in range(3)]
    changed[0].transformer.config = dataclasses.replace(pipe.transformer.config, theta=500)
    changed[1].scheduler = dataclasses.replace(pipe.scheduler, shift=1.5)
    t5 = changed[2].text_encoders.text_encoder_2
    t5.config = dataclasses.replace(t5.config, layer_norm_epsilon=1e-5)
    assert len({one.fingerprint() for one in (pipe, *changed)}) == 4


def test_fingerprint_tells_activation_bits_apart():
    names = set()
    for bits in (16, 8):
        pipe = small_pipeline()
        quant = QuantConfig(activation_bits=bits)
        replace_linears(
            pipe.transformer,
            ["single_blocks.0.linear1"],
            lambda _, linear, quant=quant: TernaryLinear.from_linear(linear, quant),
        )
        names.add(pipe.fingerprint())
    assert len(names) == 2


def test_settings_do_not_depend_on_how_numbers_are_written(pipe):
    config = pipe.transformer.config
    found = [
        fingerprint.config_settings(dataclasses.replace(config, mlp_ratio=ratio))
        for ratio in (2, 2.0, 4, 4.0)
    ]
    assert found[0] == found[1] != found[2] == found[3] == fingerprint.config_settings(config)
    assert "mlp_ratio=2.0" in found[0]


def test_fingerprint_outlives_the_text_encoders():
    pipe = small_pipeline()
    before = pipe.fingerprint()
    pipe.free_text_encoders()
    assert pipe.fingerprint() == before


@pytest.mark.parametrize("placement", ["resident", "offloaded", "streamed"])
def test_fingerprint_sees_text_encoders_that_changed(placement):
    pipe = small_pipeline(placement=placement)
    before = pipe.fingerprint()
    encoder = pipe.text_encoders.text_encoder
    nnx.update(encoder, jax.tree.map(lambda v: jnp.asarray(v) * 0, nnx.state(encoder)))
    changed = pipe.fingerprint()
    assert changed != before
    nnx.update(encoder, jax.tree.map(lambda v: jnp.asarray(v) + 1, nnx.state(encoder)))
    # What is kept is how they were last.
    pipe.free_text_encoders()
    assert pipe.fingerprint() not in (before, changed)


def test_fingerprint_does_not_depend_on_the_dtype(pipe):
    assert small_pipeline(dtype=jnp.bfloat16).fingerprint() == pipe.fingerprint()


def test_checksums_on_the_host_and_on_the_device_agree():
    random = np.random.default_rng(0)
    for array in (
        random.standard_normal((7, 5, 3)).astype(np.float32),
        jnp.asarray(random.standard_normal(33), jnp.bfloat16),
        random.integers(0, 255, (4, 9), dtype=np.uint8),
        np.float32(2.5),
    ):
        on_host = fingerprint._checksum_on_host(np.asarray(array))
        assert on_host == int(fingerprint._checksum(jnp.asarray(array)))
