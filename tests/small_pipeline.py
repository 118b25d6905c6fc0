"""A whole pipeline with random weights, small enough to draw in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flux_jax.configs import (
    AutoencoderConfig,
    CLIPTextConfig,
    FluxConfig,
    SchedulerConfig,
    T5Config,
)
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompts import TextEncoders
from tests.convert.models import diffusers_folder
from tests.random_module import random_module

CLIP = CLIPTextConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
    eos_token_id=3,
)
T5 = T5Config(vocab_size=32, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
TRANSFORMER = FluxConfig(
    in_channels=16,
    vec_in_dim=16,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)
VAE = AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
)
CONFIGS = {"text_encoder": CLIP, "text_encoder_2": T5, "transformer": TRANSFORMER, "vae": VAE}
WORDS = "a an the red blue green circle square cube star above below left of and on".split()
CLIP_LENGTH, T5_LENGTH = 8, 12


def word_tokenizer(length: int, *, begins: bool) -> Any:
    """A transformers tokenizer of one token a word, ending (and beginning) as CLIP and T5 do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>" if begins else None,
        eos_token="</s>",
    )


def tokenizers() -> dict[str, Any]:
    """CLIP's and T5's, by component name."""
    return {
        "tokenizer": word_tokenizer(CLIP_LENGTH, begins=True),
        "tokenizer_2": word_tokenizer(T5_LENGTH, begins=False),
    }


def small_pipeline(
    *,
    dtype: Any = jnp.float32,
    guidance_embed: bool = True,
    seed: int = 0,
    placement: str = "resident",
    **options: Any,
) -> FluxPipeline:
    """Random weights from `seed`; a native size of 32 x 32 pixels and prompts of 12 tokens."""
    transformer = dataclasses.replace(TRANSFORMER, guidance_embed=guidance_embed)
    models = {
        name: random_module(name, config, dtype, seed + number)
        for number, (name, config) in enumerate({**CONFIGS, "transformer": transformer}.items())
    }
    encoders = {name: models.pop(name) for name in ("text_encoder", "text_encoder_2")}
    return FluxPipeline(
        scheduler=SchedulerConfig.dev() if guidance_embed else SchedulerConfig.schnell(),
        text_encoders=TextEncoders(**encoders, **tokenizers(), placement=placement),
        **models,
        **options,
    )


def small_folder(path: Path) -> Path:
    """The small model of random weights as a folder in diffusers' layout."""
    diffusers_folder(path, configs=CONFIGS)
    for name, tokenizer in tokenizers().items():
        tokenizer.save_pretrained(path / name)
    return path
