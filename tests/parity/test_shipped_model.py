"""The shipped folder in diffusers' own `FluxPipeline`: it loads as it is and draws the same."""

from __future__ import annotations

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from examples.tiny_flux.scenes import encode_captions
from flux_jax.assets import TEACHER, shipped_path
from flux_jax.compare import psnr
from flux_jax.composition.prompts import load_prompts
from flux_jax.pipeline import FluxPipeline
from flux_jax.tokenization import max_length, tokenize

PROMPTS = ["a red circle above a blue square", "two small green stars on a black background"]


@pytest.fixture(scope="module")
def theirs():
    # Stored in bf16; transformers keeps that, diffusers does not.
    pipe = diffusers.FluxPipeline.from_pretrained(shipped_path(TEACHER)).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_tensor_is_loaded(theirs):
    """None is left over and none made up: a missing one would be random."""
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        loaded = dict(getattr(theirs, name).state_dict())
        stored = {}
        for path in (shipped_path(TEACHER) / name).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                stored |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        # transformers 5 drops the prefix under which CLIP is stored.
        stored, loaded = (
            {key.removeprefix("text_model."): value for key, value in tensors.items()}
            for tensors in (stored, loaded)
        )
        # T5's embedding has a second name, and CLIP's positions are counted, not learned.
        extra = {"encoder.embed_tokens.weight", "embeddings.position_ids"}
        assert stored.keys() ^ loaded.keys() <= extra
        for key in stored.keys() & loaded.keys():
            assert torch.equal(loaded[key], stored[key].float()), f"{name}: {key}"


def test_model_index_names_diffusers_classes(theirs):
    index = json.loads((shipped_path(TEACHER) / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    for name, (library, class_name) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if class_name is not None:
            assert library in {"diffusers", "transformers"}
            assert type(getattr(theirs, name)).__name__.removesuffix("Fast") in class_name


def test_token_ids_agree(theirs):
    """Of ours, of diffusers' pipeline, and of what the model was trained on."""
    texts = [prompt.prompt for prompt in load_prompts()[::9]]
    t5_ids, clip_ids = encode_captions(texts)
    for tokenizer, trained in ((theirs.tokenizer_2, t5_ids), (theirs.tokenizer, clip_ids)):
        length = max_length(tokenizer)
        # CLIP's 77 are more than any caption needs; padding behind the end changes nothing there.
        padding = ((0, 0), (0, length - trained.shape[1]))
        trained = np.pad(trained, padding, constant_values=tokenizer.pad_token_id)
        found = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        np.testing.assert_array_equal(found.numpy(), trained)
        np.testing.assert_array_equal(tokenize(tokenizer, texts, length, encoder="T5"), trained)


@pytest.mark.slow
def test_same_image(theirs):
    """fp32, the same noise, 28 steps: at least 45 dB, as the project promises."""
    ours = FluxPipeline.from_pretrained("tiny", dtype=jnp.float32)
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), 64, 64), np.float32)
    # diffusers pads to 512 tokens if not told, which is another prompt to this model.
    length = max_length(theirs.tokenizer_2)
    shared = {"guidance_scale": 3.5, "num_inference_steps": 28, "height": 128, "width": 128}
    found = ours(PROMPTS, latents=noise, progress=False, **shared)
    images = theirs(
        PROMPTS, latents=torch.from_numpy(noise), max_sequence_length=length, **shared
    ).images
    for mine, other in zip(found.images, images, strict=True):
        assert psnr(mine, other) >= 45.0
        assert np.asarray(other).std() > 10, "a flat image would prove nothing"
    assert psnr(*images) < 20, "the prompts must matter"
