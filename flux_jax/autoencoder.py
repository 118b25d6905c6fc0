"""The KL autoencoder of FLUX.1, after `src/flux/modules/autoencoder.py` of Black Forest Labs.

Names and order are the reference's: `encoder.down.I.block.J`, `mid.block_1`, and `decoder.up`
counted from the highest resolution. Images and latents are (B, H, W, C).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from flux_jax.attention import attention
from flux_jax.configs import AutoencoderConfig
from flux_jax.functional import ModuleFunction
from flux_jax.layers import Conv2d, DType, GroupNorm, Linear
from flux_jax.tiling import blend_windows, tile_starts


def norm_silu(norm: GroupNorm, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """`silu(norm(x))` in float32, rounded once to x's dtype."""
    return jax.nn.silu(norm(x.astype(jnp.float32))).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Two normalised convolutions added to the input.

    Attributes:
      nin_shortcut: 1x1 convolution of the input, where the number of channels changes; else None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_groups: int,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        options: Any = dict(dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(num_groups, in_channels, **options)
        self.conv1 = Conv2d(in_channels, out_channels, 3, **options)
        self.norm2 = GroupNorm(num_groups, out_channels, **options)
        self.conv2 = Conv2d(out_channels, out_channels, 3, **options)
        changes = in_channels != out_channels
        self.nin_shortcut = Conv2d(in_channels, out_channels, 1, **options) if changes else None

    def __call__(self, x: Float[Array, "B H W Ci"]) -> Float[Array, "B H W Co"]:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nnx.Module):
    """One-head self-attention over all positions, added to the input."""

    def __init__(self, channels: int, *, num_groups: int, dtype: DType, rngs: nnx.Rngs):
        self.norm = GroupNorm(num_groups, channels, dtype=dtype, rngs=rngs)
        # BFL: 1x1 convolutions; over tokens they are linears, as in diffusers.
        options: Any = dict(axes=("conv_out", "conv_in"), dtype=dtype, rngs=rngs)
        self.q = Linear(channels, channels, **options)
        self.k = Linear(channels, channels, **options)
        self.v = Linear(channels, channels, **options)
        self.proj_out = Linear(channels, channels, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, height * width, 1, channels)
        mixed = attention(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.proj_out(mixed.reshape(batch, height, width, channels))


class Mid(nnx.Module):
    """The middle at the lowest resolution.

    Attributes:
      attn_1: None where the config's `mid_block_add_attention` is off.
    """

    def __init__(self, config: AutoencoderConfig, *, dtype: DType, rngs: nnx.Rngs):
        options: Any = dict(num_groups=config.norm_num_groups, dtype=dtype, rngs=rngs)
        channels = config.block_out_channels[-1]
        self.block_1 = ResnetBlock(channels, channels, **options)
        self.attn_1 = AttnBlock(channels, **options) if config.mid_block_add_attention else None
        self.block_2 = ResnetBlock(channels, channels, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.block_1(x)
        if self.attn_1 is not None:
            x = self.attn_1(x)
        return self.block_2(x)


class Downsample(nnx.Module):
    """Halves height and width by a strided 3x3 convolution, padded below and right alone."""

    def __init__(self, channels: int, *, dtype: DType, rngs: nnx.Rngs):
        self.conv = Conv2d(
            channels, channels, 3, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype: DType, rngs: nnx.Rngs):
        self.conv = Conv2d(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo C"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def _blocks(in_channels: int, out_channels: int, count: int, **options: Any) -> list[ResnetBlock]:
    """The blocks of one level; the first changes the number of channels."""
    widths = [in_channels] + [out_channels] * count
    return [ResnetBlock(a, b, **options) for a, b in zip(widths, widths[1:], strict=False)]


class DownLevel(nnx.Module):
    """The encoder's blocks at one resolution.

    Attributes:
      downsample: to the next lower resolution; None at the last.
    """

    def __init__(self, block: list[ResnetBlock], downsample: Downsample | None):
        self.block = nnx.List(block)
        self.downsample = downsample

    def __call__(self, x: Float[Array, "B H W Ci"]) -> Float[Array, "B Ho Wo Co"]:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nnx.Module):
    """The decoder's blocks at one resolution.

    Attributes:
      upsample: to the next higher resolution; None at the image's own.
    """

    def __init__(self, block: list[ResnetBlock], upsample: Upsample | None):
        self.block = nnx.List(block)
        self.upsample = upsample

    def __call__(self, x: Float[Array, "B H W Ci"]) -> Float[Array, "B Ho Wo Co"]:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nnx.Module):
    """Images to the mean and log variance of their latents, stacked along the channels."""

    def __init__(self, config: AutoencoderConfig, *, dtype: DType, rngs: nnx.Rngs):
        options: Any = dict(dtype=dtype, rngs=rngs)
        groups, widths = config.norm_num_groups, config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, **options)
        levels = []
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            blocks = _blocks(before, width, config.layers_per_block, num_groups=groups, **options)
            last = i == len(widths) - 1
            levels.append(DownLevel(blocks, None if last else Downsample(width, **options)))
        self.down = nnx.List(levels)
        self.mid = Mid(config, **options)
        self.norm_out = GroupNorm(groups, widths[-1], **options)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Decoder(nnx.Module):
    """Raw latents to images.

    Attributes:
      up: the levels from the highest resolution to the lowest; they run from the last to the first.
    """

    def __init__(self, config: AutoencoderConfig, *, dtype: DType, rngs: nnx.Rngs):
        options: Any = dict(dtype=dtype, rngs=rngs)
        groups, widths = config.norm_num_groups, config.block_out_channels
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, **options)
        self.mid = Mid(config, **options)
        levels = []
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            count = config.layers_per_block + 1
            blocks = _blocks(before, width, count, num_groups=groups, **options)
            levels.append(UpLevel(blocks, None if i == 0 else Upsample(width, **options)))
        self.up = nnx.List(levels)
        self.norm_out = GroupNorm(groups, widths[0], **options)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, **options)

    def __call__(self, z: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Autoencoder(nnx.Module):
    """Images in [-1, 1] to scaled latents and back."""

    def __init__(self, config: AutoencoderConfig, *, dtype: DType = jnp.bfloat16, rngs: nnx.Rngs):
        """Builds encoder and decoder.

        Args:
          config: sizes.
          dtype: of the parameters, hence of the computation.
          rngs: `params` stream.
        """
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def moments(
        self, images: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Mean and log variance of the raw latents, in float32.

        Args:
          images: in [-1, 1]; sides are multiples of `config.downscale`.

        Returns:
          The mean, and the log variance clipped to [-30, 20].

        Raises:
          ValueError: sides that do not divide.
        """
        height, width = images.shape[1:3]
        unit = self.config.downscale
        if height % unit or width % unit:
            raise ValueError(
                f"images must have sides that are multiples of {unit}, got {height} x {width}; "
                "crop or resize them"
            )
        mean, logvar = jnp.split(self.encoder(images).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(
        self, images: Float[Array, "B H W C"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B h w Z"]:
        """Images to scaled latents, `(raw - shift_factor) * scaling_factor`.

        Args:
          images: in [-1, 1]; sides are multiples of `config.downscale`.
          key: to sample from the posterior; without one, its mean.

        Returns:
          (B, H / downscale, W / downscale, latent_channels), in the parameters' dtype.
        """
        raw, logvar = self.moments(images)
        if key is not None:
            raw = raw + jnp.exp(0.5 * logvar) * jax.random.normal(key, raw.shape, jnp.float32)
        scaled = (raw - self.config.shift_factor) * self.config.scaling_factor
        return scaled.astype(self.decoder.conv_in.weight.dtype)

    def decode(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Scaled latents to images, whole.

        Args:
          latents: as `encode` returns them.

        Returns:
          (B, h * downscale, w * downscale, out_channels), about [-1, 1], in the parameters' dtype.
        """
        latents = latents.astype(jnp.float32)
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)

    def decode_tiled(
        self, latents: Float[Array, "B h w Z"], *, tile: int = 64, overlap: int = 16
    ) -> Float[np.ndarray, "B H W C"]:
        """Scaled latents to images, one tile of one image at a time on each device.

        Device memory depends on `tile` alone: every tile has the same shape, is decoded by one
        compiled function, and is blended on the host with linear ramps across the overlaps. Not
        for use under `jit`.

        An image of one tile comes out as from `decode`. A larger one differs, smoothly: each tile
        has its own group-norm statistics and its own attention, so tone can drift between tiles
        by a little, and a larger tile brings the result closer to the whole.

        Args:
          latents: as `encode` returns them.
          tile: side of a tile in latent pixels; a shorter side of the image is one tile.
          overlap: least number of latent pixels that neighbouring tiles share.

        Returns:
          The images in float32, on the host.

        Raises:
          ValueError: overlap not in [0, tile).
        """
        decode = DECODE.bind(self)
        unit = self.config.downscale
        batch, height, width, _ = latents.shape
        sides = (min(tile, height), min(tile, width))
        tops, lefts = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
        rows = blend_windows([unit * y for y in tops], unit * sides[0])
        columns = blend_windows([unit * x for x in lefts], unit * sides[1])
        shape = (batch, unit * height, unit * width, self.config.out_channels)
        images = np.zeros(shape, np.float32)
        on_host = np.asarray(latents)
        pieces = [
            (i, (top, row), (left, column))
            for i in range(batch)
            for top, row in zip(tops, rows, strict=True)
            for left, column in zip(lefts, columns, strict=True)
        ]
        for start in range(0, len(pieces), decode.parts):
            some = pieces[start : start + decode.parts]
            # Filled up with its last tile: every device has one.
            filled = some + some[-1:] * (decode.parts - len(some))
            tiles = np.stack(
                [
                    on_host[i, top : top + sides[0], left : left + sides[1]]
                    for i, (top, _), (left, _) in filled
                ]
            )
            decoded = np.asarray(decode(*decode.place(tiles)), np.float32)
            for tile_image, (i, (top, row), (left, column)) in zip(decoded, some, strict=False):
                ys = slice(unit * top, unit * (top + sides[0]))
                xs = slice(unit * left, unit * (left + sides[1]))
                images[i, ys, xs] += row[:, None, None] * column[:, None] * tile_image
        return images


DECODE = ModuleFunction(Autoencoder.decode, arguments=(("batch",),), result=("batch",))
