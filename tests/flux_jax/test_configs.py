"""Configurations that no model can have are refused where they are made."""

from __future__ import annotations

import pytest

from flux_jax.configs import AutoencoderConfig, FluxConfig, SchedulerConfig, T5Config
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
        (SchedulerConfig, {"max_image_seq_len": 256}, "must differ, .*; got 256 for both"),
    ],
)
def test_refusals(config, fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)
