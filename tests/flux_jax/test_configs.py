"""Configurations that no model can have are refused where they are made."""

from __future__ import annotations

import pytest

from flux_jax.configs import (
    AutoencoderConfig,
    CLIPTextConfig,
    FluxConfig,
    SchedulerConfig,
    T5Config,
)
from flux_jax.errors import UserError


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (FluxConfig, {"num_heads": 25}, "multiple of num_heads, got 3072 and 25"),
        (FluxConfig, {"axes_dim": (16, 56, 55)}, "even and sum to the head width 128, got .*127"),
        (FluxConfig, {"axes_dim": (17, 56, 55)}, "even and sum to the head width 128, got .*128"),
        (AutoencoderConfig, {"norm_num_groups": 48}, r"multiples of norm_num_groups 48.* \[128, "),
        (T5Config, {"relative_attention_num_buckets": 3}, "must be at least 4, .* got 3 and 128"),
        (T5Config, {"relative_attention_max_distance": 8}, "a quarter of it less .* got 32 and 8"),
        (FluxConfig, {"num_heads": 0}, "^num_heads must be a whole number of at least 1, got 0"),
        (FluxConfig, {"depth": -1}, "^depth must be a whole number of at least 0, got -1"),
        (FluxConfig, {"axes_dim": (128, 0)}, r"^axes_dim must be whole numbers .* got \(128, 0\)"),
        (FluxConfig, {"mlp_ratio": 0.0}, "^mlp_ratio must be a finite number above 0, got 0.0"),
        (T5Config, {"num_layers": True}, "^num_layers must be a whole number .* got True"),
        (T5Config, {"layer_norm_epsilon": float("nan")}, "^layer_norm_epsilon must be a finite"),
        (CLIPTextConfig, {"num_attention_heads": 0}, "^num_attention_heads must be .* got 0"),
        (CLIPTextConfig, {"eos_token_id": -1}, "^eos_token_id must be .* at least 0, got -1"),
        (AutoencoderConfig, {"norm_num_groups": 0}, "^norm_num_groups must be .* got 0"),
        (AutoencoderConfig, {"block_out_channels": ()}, r"^block_out_channels must be .* got \(\)"),
        (SchedulerConfig, {"shift": 0.0}, "^shift must be a finite number above 0, got 0.0"),
        (SchedulerConfig, {"base_shift": float("inf")}, "^base_shift must be a finite .* got inf"),
        (SchedulerConfig, {"num_train_timesteps": 0}, "^num_train_timesteps must be .* got 0"),
        (SchedulerConfig, {"max_image_seq_len": 256}, "must differ, .*; got 256 for both"),
    ],
)
def test_refusals(config, fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)
