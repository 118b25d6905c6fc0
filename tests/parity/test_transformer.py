"""The transformer against diffusers' `FluxTransformer2DModel`, whole and block by block."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from convert.maps import transformer as transformer_map
from flux_jax.configs import FluxConfig
from flux_jax.rope import image_ids, text_ids
from flux_jax.transformer import FluxTransformer
from tests.parity.common import TOLERANCE, ours, perturb_vectors, relative_error, run

CONFIGS = {
    "tiny": dataclasses.replace(FluxConfig.tiny(), depth=2, depth_single_blocks=2),
    "schnell": FluxConfig(
        in_channels=16,
        vec_in_dim=24,
        context_in_dim=40,
        hidden_size=96,
        num_heads=3,
        depth=1,
        depth_single_blocks=3,
        axes_dim=(4, 12, 16),
        guidance_embed=False,
    ),
    "one_head": FluxConfig(
        in_channels=64,
        vec_in_dim=8,
        context_in_dim=12,
        hidden_size=32,
        num_heads=1,
        depth=2,
        depth_single_blocks=1,
        axes_dim=(8, 8, 16),
    ),
}


@pytest.fixture(scope="module", params=[(n, d) for n in CONFIGS for d in TOLERANCE], ids="-".join)
def models(request, tmp_path_factory):
    """Config, dtype, diffusers' model and ours with the same weights."""
    name, dtype = request.param
    torch.manual_seed(0)
    fields = transformer_map.config_to_hf(CONFIGS[name])
    model = diffusers.FluxTransformer2DModel.from_config(fields).eval()
    perturb_vectors(model, seed=1)
    folder = tmp_path_factory.mktemp("transformer")
    return (
        CONFIGS[name],
        dtype,
        model,
        ours(model, "transformer", dtype, folder, max_shard_size="1MB"),
    )


def draw(config, batch, height, width, length, seed=0):
    """Inputs in our names, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    return {
        "img": rng.standard_normal((batch, height * width, config.in_channels), np.float32),
        "img_ids": image_ids(height, width),
        "txt": rng.standard_normal((batch, length, config.context_in_dim), np.float32),
        "txt_ids": text_ids(length),
        "timesteps": rng.uniform(0.001, 1.0, batch).astype(np.float32),
        "y": rng.standard_normal((batch, config.vec_in_dim), np.float32),
        "guidance": rng.uniform(1, 8, batch).astype(np.float32) if config.guidance_embed else None,
    }


def diffusers_arguments(inputs):
    tensors = {name: None if v is None else torch.tensor(v) for name, v in inputs.items()}
    return {
        "hidden_states": tensors["img"],
        "encoder_hidden_states": tensors["txt"],
        "pooled_projections": tensors["y"],
        "timestep": tensors["timesteps"],
        "img_ids": tensors["img_ids"].float(),
        "txt_ids": tensors["txt_ids"].float(),
        "guidance": tensors["guidance"],
    }


def streams(transformer: FluxTransformer, img, img_ids, txt, txt_ids, timesteps, y, *guidance):
    """Each block's output: (text, image) of the double ones, the sequence of the single ones."""
    import jax.numpy as jnp

    from flux_jax.rope import rotary_angles

    mods = transformer.modulations(transformer.conditioning(timesteps, y, *guidance))
    config = transformer.config
    positions = jnp.concatenate((txt_ids, img_ids))
    rotation = rotary_angles(positions, config.axes_dim, config.theta)
    img, txt = transformer.img_in(img), transformer.txt_in(txt)
    out = []
    for block, block_mods in zip(transformer.double_blocks, mods.double, strict=True):
        img, txt = block(img, txt, block_mods, rotation)
        out.append((txt, img))
    x = jnp.concatenate((txt, img), axis=1)
    for block, block_mods in zip(transformer.single_blocks, mods.single, strict=True):
        x = block(x, block_mods, rotation)
        out.append((x[:, : txt.shape[1]], x[:, txt.shape[1] :]))
    return out


def positional(inputs):
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    return [inputs[name] for name in names if inputs[name] is not None]


@pytest.mark.parametrize(("batch", "height", "width", "length"), [(1, 3, 5, 7), (2, 8, 4, 1)])
def test_whole(models, batch, height, width, length):
    config, dtype, theirs, ours = models
    inputs = draw(config, batch, height, width, length, seed=height)
    with torch.no_grad():
        expected = theirs(**diffusers_arguments(inputs), return_dict=False)[0]
    velocity = run(FluxTransformer.__call__, ours, *positional(inputs))
    assert velocity.dtype == dtype
    assert relative_error(velocity, expected) <= TOLERANCE[dtype]


def test_every_block(models):
    config, dtype, theirs, ours = models
    inputs = draw(config, 2, 4, 6, 5)
    expected = []
    blocks = [*theirs.transformer_blocks, *theirs.single_transformer_blocks]
    hooks = [
        block.register_forward_hook(lambda _, __, out: expected.append(out)) for block in blocks
    ]
    with torch.no_grad():
        theirs(**diffusers_arguments(inputs))
    for hook in hooks:
        hook.remove()
    found = run(streams, ours, *positional(inputs))
    assert len(found) == len(expected) == config.depth + config.depth_single_blocks
    for ours_streams, their_streams in zip(found, expected, strict=True):
        for stream, reference in zip(ours_streams, their_streams, strict=True):
            assert relative_error(stream, reference) <= TOLERANCE[dtype]


def test_time_is_float32_in_bfloat16(models):
    """A time that bf16 would round is told from its neighbour."""
    config, dtype, theirs, ours = models
    if dtype != "bfloat16":
        pytest.skip("a property of the 16-bit model")
    inputs = draw(config, 1, 2, 2, 3)
    inputs["timesteps"] = np.array([0.8980], np.float32)
    first = run(FluxTransformer.__call__, ours, *positional(inputs))
    inputs["timesteps"] = np.array([0.8995], np.float32)
    second = run(FluxTransformer.__call__, ours, *positional(inputs))
    assert np.float32(0.8980).astype(first.dtype) == np.float32(0.8995).astype(first.dtype)
    with torch.no_grad():
        expected = theirs(**diffusers_arguments(inputs), return_dict=False)[0]
    assert relative_error(second, first) > 0
    assert relative_error(second, expected) <= TOLERANCE[dtype]
