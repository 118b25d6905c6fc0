"""Configs of the text encoders and the autoencoder, from and to Hugging Face's."""

from __future__ import annotations

import json

import pytest

from convert.maps import autoencoder, clip, t5
from flux_jax.configs import AutoencoderConfig, CLIPTextConfig, T5Config
from flux_jax.errors import UserError

CASES = {
    "t5": (t5, [T5Config.xxl(), T5Config.tiny()]),
    "clip": (clip, [CLIPTextConfig.large(), CLIPTextConfig.tiny(), CLIPTextConfig(eos_token_id=0)]),
    "autoencoder": (autoencoder, [AutoencoderConfig.flux(), AutoencoderConfig.tiny()]),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name):
    table, configs = CASES[name]
    for config in configs:
        assert table.config_from_hf(json.loads(json.dumps(table.config_to_hf(config)))) == config


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        (t5, {"feed_forward_proj": "relu"}, "feed_forward_proj must be 'gated-gelu'.*got 'relu'"),
        (t5, {"model_type": "umt5"}, "model_type must be 't5', got 'umt5'"),
        (t5, {"d_model": None}, "T5 config: d_model is missing"),
        (clip, {"model_type": "siglip"}, "model_type must be 'clip_text_model', got 'siglip'"),
        (clip, {"eos_token_id": [2]}, "eos_token_id must be a positive integer"),
        (autoencoder, {"_class_name": "AutoencoderDC"}, "_class_name must be 'AutoencoderKL'"),
        (autoencoder, {"use_quant_conv": True}, "use_quant_conv must be False, got True"),
        (autoencoder, {"latents_mean": [0.1]}, "latents_mean must be None"),
        (autoencoder, {"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types must be"),
        (autoencoder, {"act_fn": "mish"}, "act_fn must be 'silu', got 'mish'"),
        (autoencoder, {"block_out_channels": 4}, "block_out_channels must be"),
        (autoencoder, {"block_out_channels": [33] * 4}, "must be multiples of norm_num_groups 32"),
    ],
)
def test_another_architecture_is_refused(table, changes, message):
    (config,) = [configs[0] for t, configs in CASES.values() if t is table]
    with pytest.raises(UserError, match=message):
        table.config_from_hf({**table.config_to_hf(config), **changes})


@pytest.mark.parametrize("name", ["use_quant_conv", "use_post_quant_conv"])
def test_an_autoencoder_that_does_not_say_has_the_extra_convolutions(name):
    raw = autoencoder.config_to_hf(AutoencoderConfig.flux())
    del raw[name]
    with pytest.raises(UserError, match=f"{name} must be False, got True"):
        autoencoder.config_from_hf(raw)


def test_fields_that_older_files_leave_out():
    raw = t5.config_to_hf(T5Config.xxl())
    del raw["relative_attention_max_distance"]
    assert t5.config_from_hf(raw) == T5Config.xxl()
    raw = clip.config_to_hf(CLIPTextConfig.large())
    del raw["eos_token_id"]
    assert clip.config_from_hf(raw).eos_token_id == 49_407
    raw = autoencoder.config_to_hf(AutoencoderConfig.flux())
    raw["shift_factor"] = None
    assert autoencoder.config_from_hf(raw).shift_factor == 0
