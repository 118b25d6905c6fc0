"""Fingerprints: equal for equal weights, whatever they are kept as, and for no others."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from flux_jax import fingerprint
from tests.small_pipeline import small_pipeline


def test_fingerprint_tells_weights_apart(pipe):
    assert pipe.fingerprint() == small_pipeline().fingerprint()
    assert pipe.fingerprint() != small_pipeline(seed=1).fingerprint()
    # One weight in one component, and the order of two equal sums.
    changed = small_pipeline()
    bias = changed.vae.decoder.conv_out.bias
    bias.set_value(bias.get_value()[::-1])
    assert pipe.fingerprint() != changed.fingerprint()


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
