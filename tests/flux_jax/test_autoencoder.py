"""The autoencoder by itself; tests/parity compares it with diffusers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax import attention as attention_module
from flux_jax.autoencoder import AttnBlock, Autoencoder, Decoder
from flux_jax.configs import AutoencoderConfig
from flux_jax.functional import ModuleFunction
from flux_jax.tiling import tile_starts
from tests.random_module import random_module

CONFIG = AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
)
decode = ModuleFunction(Autoencoder.decode)
moments = ModuleFunction(Autoencoder.moments)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return random_module("vae", CONFIG)


def latents(batch: int, height: int, width: int, channels: int = 4) -> jax.Array:
    shape = (batch, height, width, channels)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def test_sizes_of_latents_and_images(autoencoder):
    z = jax.eval_shape(autoencoder.encode, jax.ShapeDtypeStruct((2, 12, 20, 3), jnp.float32))
    assert z.shape == (2, 6, 10, 4)
    assert jax.eval_shape(autoencoder.decode, z).shape == (2, 12, 20, 3)


def test_encode_scales_the_mean_and_samples_around_it(autoencoder):
    images = latents(1, 8, 8, 3)
    mean, logvar = moments.bind(autoencoder)(images)
    scaled = ModuleFunction(Autoencoder.encode).bind(autoencoder)(images)
    np.testing.assert_allclose(scaled, (mean - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)

    def sample(module, images, seeds):
        return jax.vmap(lambda seed: module.encode(images, key=jax.random.key(seed)))(seeds)

    samples = ModuleFunction(sample).bind(autoencoder)(images, jnp.arange(1000))
    spread = 0.3611 * np.exp(0.5 * np.asarray(logvar))
    # Five standard errors of a mean and of a deviation over 1000 draws.
    np.testing.assert_allclose((np.mean(samples, 0) - scaled) / spread, 0, atol=5 / 1000**0.5)
    np.testing.assert_allclose(np.std(samples, 0) / spread, 1, atol=5 / 2000**0.5)


def test_the_log_variance_is_clipped(autoencoder):
    graphdef, state = nnx.split(autoencoder)
    loud = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    loud.encoder.conv_out.bias[...] = jnp.asarray([0.0] * 4 + [100.0, -100.0, 0.0, 0.0])
    _, logvar = moments.bind(loud)(latents(1, 8, 8, 3))
    np.testing.assert_array_equal(logvar[..., 0], 20)
    np.testing.assert_array_equal(logvar[..., 1], -30)


def test_sides_that_do_not_divide_are_refused(autoencoder):
    with pytest.raises(ValueError, match="sides that are multiples of 2, got 8 x 9"):
        autoencoder.encode(jnp.zeros((1, 8, 9, 3)))


def test_bf16_stays_bf16():
    module = random_module("vae", CONFIG, jnp.bfloat16)
    z = ModuleFunction(Autoencoder.encode).bind(module)(latents(1, 8, 8, 3))
    assert z.dtype == jnp.bfloat16
    assert decode.bind(module)(z).dtype == jnp.bfloat16


def test_an_autoencoder_is_built_from_a_seed():
    config = AutoencoderConfig(
        latent_channels=2, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2
    )
    module = Autoencoder(config, rngs=nnx.Rngs(0))
    out = decode.bind(module)(latents(1, 4, 4, 2))
    assert bool(jnp.all(jnp.isfinite(out.astype(jnp.float32))))


def test_the_attention_in_chunks_of_queries_is_the_same(monkeypatch):
    channels, size = 16, 9
    block = AttnBlock(channels, num_groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = latents(2, size, size, channels)
    whole = ModuleFunction(AttnBlock.__call__).bind(block)(x)
    monkeypatch.setattr(attention_module, "_MAX_SCORES", 2 * size**4 // 3)
    compiled = jax.jit(lambda x: block(x)).lower(x).compile()
    assert "while" in compiled.as_text()
    np.testing.assert_allclose(compiled(x), whole, rtol=1e-5, atol=1e-6)


def test_one_tile_is_the_whole_decode(autoencoder):
    z = latents(2, 5, 6)
    bound = decode.bind(autoencoder)
    tiled = autoencoder.decode_tiled(z, tile=8, overlap=2)
    for i in range(2):
        np.testing.assert_array_equal(tiled[i], bound(z[i : i + 1])[0])


def test_tiles_lie_where_they_belong(autoencoder):
    """Outside of the overlaps, the image is that of the tile alone."""
    z = latents(1, 6, 14)
    tile, overlap = 6, 2
    tiled = autoencoder.decode_tiled(z, tile=tile, overlap=overlap)
    assert tile_starts(14, tile, overlap) == [0, 4, 8]
    bound = decode.bind(autoencoder)
    for left in (0, 4, 8):
        alone = bound(z[:, :, left : left + tile])
        first = 0 if left == 0 else overlap
        last = tile if left == 8 else tile - overlap
        np.testing.assert_array_equal(
            tiled[:, :, 2 * (left + first) : 2 * (left + last)],
            alone[:, :, 2 * first : 2 * last],
        )


def test_tiles_are_close_to_the_whole(autoencoder):
    """Without what sees the whole image, only the tiles' padded borders differ.

    The attention is taken out and the norms' statistics are made equal in every tile, by latents
    that repeat with the period of the tiles.
    """
    config = dataclasses.replace(CONFIG, mid_block_add_attention=False)
    module = random_module("vae", config)
    period = 24
    z = jnp.tile(latents(1, period, period), (1, 2, 2, 1))
    whole = np.asarray(decode.bind(module)(z))
    errors = []
    for overlap in (0, 8):
        tiled = module.decode_tiled(z, tile=period, overlap=overlap)
        errors.append(np.linalg.norm(tiled - whole) / np.linalg.norm(whole))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02


def test_memory_and_compilations_do_not_grow_with_the_image(monkeypatch):
    traced = []
    call = Decoder.__call__

    def spy(self, z):
        traced.append(z.shape)
        return call(self, z)

    monkeypatch.setattr(Decoder, "__call__", spy)
    # No other test has this config: nothing is compiled yet.
    module = random_module("vae", dataclasses.replace(CONFIG, scaling_factor=0.5))
    for size in (9, 16, 27):
        images = module.decode_tiled(latents(1, size, size + 1), tile=8, overlap=2)
        assert images.shape == (1, 2 * size, 2 * size + 2, 3)
    assert traced == [(1, 8, 8, 4)]

    def peak(size: int) -> int:
        compiled = jax.jit(lambda z: module.decode(z)).lower(latents(1, size, size)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(27) > 4 * peak(8)


def test_an_overlap_as_large_as_the_tile_is_refused(autoencoder):
    with pytest.raises(ValueError, match="less than tile 8, got 8"):
        autoencoder.decode_tiled(latents(1, 16, 16), tile=8, overlap=8)
