"""Autoencoder against diffusers' `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Iterable

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from convert.maps import autoencoder as autoencoder_map
from convert.plan import backward_plan
from flux_jax.autoencoder import Autoencoder
from flux_jax.configs import AutoencoderConfig
from flux_jax.tree import to_flat
from tests.parity.common import TOLERANCE, ours, perturb_vectors, relative_error, run
from tests.random_module import random_module

CONFIGS = {
    "tiny": AutoencoderConfig.tiny(),
    "two_blocks": AutoencoderConfig(
        block_out_channels=(16, 16, 48),
        latent_channels=5,
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=40,
        scaling_factor=0.7,
        shift_factor=-0.3,
    ),
    "no_attention": AutoencoderConfig(
        in_channels=1,
        out_channels=2,
        block_out_channels=(8,),
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ),
}


# Of the images that are encoded and of the latents that are decoded: batch, height, width.
SIZES = {
    "tiny": ((2, 40, 24), (2, 5, 3)),
    "two_blocks": ((1, 8, 12), (1, 1, 2)),
    "no_attention": ((3, 7, 5), (1, 9, 4)),
}


@pytest.fixture(scope="module", params=[(n, d) for n in CONFIGS for d in TOLERANCE], ids="-".join)
def models(request, tmp_path_factory):
    """Name of the config, dtype, diffusers' model and ours with the same weights."""
    name, dtype = request.param
    torch.manual_seed(0)
    raw = autoencoder_map.config_to_hf(CONFIGS[name])
    model = diffusers.AutoencoderKL.from_config(raw).eval()
    perturb_vectors(model, seed=1)
    folder = tmp_path_factory.mktemp("vae")
    return name, dtype, model, ours(model, "vae", dtype, folder)


def record(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """A list to which each module's output will be added."""
    outputs: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


def uniform(*shape: int) -> torch.Tensor:
    """In [-1, 1], the same whichever tests run."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def encoder_states(autoencoder: Autoencoder, images):
    """The state after each level, then mean and log variance, then the scaled latents."""
    encoder = autoencoder.encoder
    states = [encoder.conv_in(images)]
    for layer in (*encoder.down, encoder.mid):
        states.append(layer(states[-1]))
    return states, autoencoder.moments(images), autoencoder.encode(images)


def decoder_states(autoencoder: Autoencoder, latents):
    """The state after each level, then the images."""
    config, decoder = autoencoder.config, autoencoder.decoder
    states = [decoder.conv_in(latents / config.scaling_factor + config.shift_factor)]
    for layer in (decoder.mid, *reversed(decoder.up)):
        states.append(layer(states[-1]))
    return states, autoencoder.decode(latents)


def test_encode(models):
    name, dtype, model, ours = models
    config = CONFIGS[name]
    batch, height, width = SIZES[name][0]
    images = uniform(batch, config.in_channels, height, width)
    encoder = model.encoder
    expected_states = record([encoder.conv_in, *encoder.down_blocks, encoder.mid_block])
    with torch.no_grad():
        posterior = model.encode(images).latent_dist

    states, (mean, logvar), latents = run(encoder_states, ours, channels_last(images))
    for state, expected in zip(states, expected_states, strict=True):
        assert relative_error(state, channels_last(expected)) <= TOLERANCE[dtype]
    assert relative_error(mean, channels_last(posterior.mean)) <= TOLERANCE[dtype]
    assert relative_error(logvar, channels_last(posterior.logvar)) <= TOLERANCE[dtype]
    scaled = (posterior.mean - config.shift_factor) * config.scaling_factor
    assert latents.dtype == dtype
    assert relative_error(latents, channels_last(scaled)) <= TOLERANCE[dtype]


def test_decode(models):
    name, dtype, model, ours = models
    config = CONFIGS[name]
    batch, height, width = SIZES[name][1]
    latents = 2 * uniform(batch, config.latent_channels, height, width)
    decoder = model.decoder
    expected_states = record([decoder.conv_in, decoder.mid_block, *decoder.up_blocks])
    with torch.no_grad():
        expected_images = model.decode(latents / config.scaling_factor + config.shift_factor).sample

    states, images = run(decoder_states, ours, channels_last(latents))
    for state, expected in zip(states, expected_states, strict=True):
        assert relative_error(state, channels_last(expected)) <= TOLERANCE[dtype]
    assert images.dtype == dtype
    assert relative_error(images, channels_last(expected_images)) <= TOLERANCE[dtype]


def test_bfl_names_are_those_that_diffusers_reads():
    """Written under BFL's names, read by diffusers' own single-file converter."""
    config = CONFIGS["two_blocks"]
    ours = random_module("vae", config, jnp.float32)
    flat = to_flat(ours)
    plan = backward_plan(
        autoencoder_map.bfl_map(config), {name: x.shape for name, x in flat.items()}
    )
    tensors = {}
    for assembly in plan.assemblies:
        (piece,) = assembly.pieces
        array = np.array(flat[piece.source]).reshape(assembly.shape)
        tensors[assembly.name] = torch.tensor(array)

    raw = autoencoder_map.config_to_hf(config)
    model = diffusers.AutoencoderKL.from_config(raw).eval()
    model.load_state_dict(convert_ldm_vae_checkpoint(tensors, raw))
    latents = torch.randn(1, config.latent_channels, 3, 4, generator=torch.manual_seed(0))
    with torch.no_grad():
        images = model.decode(latents / config.scaling_factor + config.shift_factor).sample
        mean = model.encode(images).latent_dist.mean
    ours_images = run(Autoencoder.decode, ours, channels_last(latents))
    assert relative_error(ours_images, channels_last(images)) <= TOLERANCE["float32"]
    ours_mean, _ = run(Autoencoder.moments, ours, channels_last(images))
    assert relative_error(ours_mean, channels_last(mean)) <= TOLERANCE["float32"]


def test_a_config_goes_both_ways():
    config = CONFIGS["two_blocks"]
    theirs = diffusers.AutoencoderKL.from_config(autoencoder_map.config_to_hf(config))
    assert autoencoder_map.config_from_hf(dict(theirs.config)) == config
