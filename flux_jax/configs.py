"""Hyper-parameters of every component: frozen, small, and named as in the field.

`FluxConfig` follows `FluxParams` of Black Forest Labs' reference (`src/flux/model.py`); the text
encoders and the autoencoder follow transformers' `T5Config` and `CLIPTextConfig` and diffusers'
`AutoencoderKL`. No dtype, mesh, path or random state lives here.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Container
from typing import Any

from flux_jax.errors import UserError


def _check_numbers(
    config: Any, *, may_be_zero: Container[str] = (), positive: Container[str] = ()
) -> None:
    """See that a configuration's numbers are some that a model can have.

    Args:
      config: its integers must be whole and at least 1, its floats finite.
      may_be_zero: integers that are at least 0.
      positive: floats that are above 0.

    Raises:
      UserError: one is not.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        least = 0 if name in may_be_zero else 1
        if field.type == "int" and not _is_whole(value, least):
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if field.type == "tuple[int, ...]" and not (value and all(_is_whole(v, 1) for v in value)):
            raise UserError(f"{name} must be whole numbers of at least 1, got {value!r}")
        if field.type == "float" and not _is_finite(value, above_zero=name in positive):
            above = " above 0" if name in positive else ""
            raise UserError(f"{name} must be a finite number{above}, got {value!r}")


def _is_whole(value: Any, least: int) -> bool:
    # JSON's 10000.0 is whole.
    return _is_number(value) and value >= least and value % 1 == 0


def _is_finite(value: Any, *, above_zero: bool) -> bool:
    return _is_number(value) and math.isfinite(value) and (value > 0 or not above_zero)


def _is_number(value: Any) -> bool:
    # Python's True is one.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The FLUX.1 transformer.

    Attributes:
      in_channels: channels of an image token: 4 x latent channels after 2x2 patching.
      vec_in_dim: width of the pooled CLIP embedding.
      context_in_dim: width of the T5 embeddings.
      hidden_size: width of the residual stream.
      mlp_ratio: hidden width of the MLPs over `hidden_size`.
      num_heads: attention heads; `hidden_size // num_heads` is the head width.
      depth: number of double-stream blocks.
      depth_single_blocks: number of single-stream blocks.
      axes_dim: rotary widths for the (index, row, column) axes; they sum to the head width.
      theta: base of the rotary frequencies.
      guidance_embed: whether the guidance scale is an input (dev) or not (schnell).
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        _check_numbers(self, may_be_zero=("depth", "depth_single_blocks"), positive=("mlp_ratio",))
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and "
                f"{self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise UserError(
                f"axes_dim must be even and sum to the head width {self.head_dim}, got "
                f"{self.axes_dim} (sum {sum(self.axes_dim)})"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def dev(cls) -> FluxConfig:
        """FLUX.1-dev: 11.9 B parameters, guidance-distilled."""
        return cls()

    @classmethod
    def schnell(cls) -> FluxConfig:
        """FLUX.1-schnell: the same shapes without the guidance embedding."""
        return cls(guidance_embed=False)

    @classmethod
    def tiny(cls) -> FluxConfig:
        """The model that ships with the project: dev in miniature, 13.6 M parameters."""
        return cls(
            vec_in_dim=128,
            context_in_dim=128,
            hidden_size=256,
            num_heads=8,
            depth=3,
            depth_single_blocks=6,
            axes_dim=(8, 12, 12),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The encoder of T5 v1.1 (gated GELU, no weight tying, no biases).

    Attributes:
      vocab_size: rows of the embedding table; the tokenizer may use fewer.
      d_model: width of the residual stream and of the result.
      d_kv: width of an attention head; `num_heads * d_kv` need not be `d_model`.
      d_ff: hidden width of the MLPs.
      num_layers, num_heads: blocks, and attention heads of each.
      relative_attention_num_buckets: relative positions that have a bias of their own, before and
        after together.
      relative_attention_max_distance: from here on positions share the last bucket.
      layer_norm_epsilon: of the RMS norms.
    """

    vocab_size: int = 32_128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10_240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_numbers(self, positive=("layer_norm_epsilon",))
        # Of the buckets of one side, half are of one distance each; the others reach farther.
        exact = self.relative_attention_num_buckets // 4
        if not 0 < exact < self.relative_attention_max_distance:
            raise UserError(
                "relative_attention_num_buckets must be at least 4, and a quarter of it less than "
                f"relative_attention_max_distance, got {self.relative_attention_num_buckets} and "
                f"{self.relative_attention_max_distance}"
            )

    @classmethod
    def xxl(cls) -> T5Config:
        """google/t5-v1_1-xxl, the text encoder of FLUX.1: 4.76 B parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> T5Config:
        """The text encoder of the shipped model."""
        return cls(vocab_size=512, d_model=128, d_kv=32, d_ff=320, num_layers=3, num_heads=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The text tower of CLIP.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream and of the result.
      intermediate_size: hidden width of the MLPs.
      num_hidden_layers, num_attention_heads: blocks, and attention heads of each.
      max_position_embeddings: the most tokens of a prompt, special ones included.
      hidden_act: of the MLPs, "quick_gelu" or "gelu".
      layer_norm_eps: of the layer norms.
      eos_token_id: the token whose final state is the pooled embedding; 2 stands for the largest id
        of a prompt, as in older configurations.
    """

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        _check_numbers(self, may_be_zero=("eos_token_id",), positive=("layer_norm_eps",))

    @classmethod
    def large(cls) -> CLIPTextConfig:
        """openai/clip-vit-large-patch14, the pooled text encoder of FLUX.1."""
        return cls()

    @classmethod
    def tiny(cls) -> CLIPTextConfig:
        """The pooled text encoder of the shipped model."""
        return cls(
            vocab_size=768,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The KL autoencoder: images to latents of 1/8 the size and back.

    Attributes:
      in_channels, out_channels: of the images.
      latent_channels: of the latents.
      block_out_channels: channels at each resolution, from the image's own to the lowest; each
        halves the sides.
      layers_per_block: residual blocks of the encoder at each resolution; the decoder has one more.
      norm_num_groups: groups of the group norms; divides every entry of `block_out_channels`.
      mid_block_add_attention: whether there is attention at the lowest resolution.
      sample_size: the image height and width it was trained for, in pixels.
      scaling_factor, shift_factor: model latents are `(raw - shift_factor) * scaling_factor`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        _check_numbers(self, positive=("scaling_factor",))
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if bad:
            raise UserError(
                f"block_out_channels must be multiples of norm_num_groups "
                f"{self.norm_num_groups}, got {bad}"
            )

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def flux(cls) -> AutoencoderConfig:
        """FLUX.1's autoencoder (`ae.safetensors`): 84 M parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> AutoencoderConfig:
        """The autoencoder of the shipped model, for 128 x 128 pixels."""
        return cls(
            block_out_channels=(32, 64, 96, 96),
            layers_per_block=1,
            norm_num_groups=16,
            sample_size=128,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The flow-matching Euler sampler's noise schedule (diffusers' names).

    Attributes:
      num_train_timesteps: levels that the model was trained with; the scale of its time.
      shift: constant shift of the schedule, used when `use_dynamic_shifting` is off.
      use_dynamic_shifting: whether the shift grows with the number of image tokens (dev).
      base_shift, max_shift: the shift exponents at `base_image_seq_len` and `max_image_seq_len`
        tokens, interpolated linearly between and beyond.
      time_shift_type: "exponential" or "linear": what the dynamic shift does with its exponent.
    """

    num_train_timesteps: int = 1000
    shift: float = 3.0
    use_dynamic_shifting: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"

    def __post_init__(self) -> None:
        _check_numbers(self, positive=("shift",))
        if self.base_image_seq_len == self.max_image_seq_len:
            raise UserError(
                "base_image_seq_len and max_image_seq_len must differ, for the shift is "
                f"interpolated between them; got {self.max_image_seq_len} for both"
            )

    @classmethod
    def dev(cls) -> SchedulerConfig:
        """FLUX.1-dev: shifted the more, the larger the image."""
        return cls()

    @classmethod
    def schnell(cls) -> SchedulerConfig:
        """FLUX.1-schnell: levels evenly spaced."""
        return cls(shift=1.0, use_dynamic_shifting=False)
