"""Latents between the autoencoder's grid and the transformer's tokens: sizes, packing, noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flux_jax.errors import UserError

# An image token is a PATCH x PATCH square of latent pixels.
PATCH = 2


# Sixteen times what 2048 x 2048 pixels have. No card has room for so many, and schedules, which are
# shifted by the number of tokens, leave the range of floats some way beyond.
MOST_TOKENS = 2**18


def check_size(height: int, width: int, multiple: int) -> None:
    """Refuse an image size that is not a whole number of tokens, or beyond all use.

    Args:
      height, width: pixels.
      multiple: pixels per token along one side (16 for FLUX.1).

    Raises:
      UserError: names the nearest sizes that work, or the most that do.
    """
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            below = size // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below > 0 else f"{multiple}"
            raise UserError(
                f"{name} must be a multiple of {multiple} pixels, got {size}; "
                f"the nearest that works is {nearest}"
            )
    tokens = (height // multiple) * (width // multiple)
    if tokens > MOST_TOKENS:
        raise UserError(
            f"an image must have at most {MOST_TOKENS} tokens of {multiple} x {multiple} pixels, "
            f"got {tokens} (height {height}, width {width})"
        )


def pack(latents: Float[Array, "B H W C"]) -> Float[Array, "B I P"]:
    """One token per 2 x 2 square of latent pixels, row by row.

    Args:
      latents: (B, H, W, C), H and W even.

    Returns:
      (B, H/2 * W/2, C * 4); within a token channels vary slowest: `c (ph pw)`.
    """
    batch, height, width, channels = latents.shape
    squares = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    tokens = squares.transpose(0, 1, 3, 5, 2, 4)
    return tokens.reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack(tokens: Float[Array, "B I P"], height: int, width: int) -> Float[Array, "B H W C"]:
    """The inverse of `pack`.

    Args:
      tokens: (B, H/2 * W/2, C * 4).
      height, width: of the latent grid, H and W.

    Returns:
      (B, H, W, C).
    """
    batch, _, features = tokens.shape
    channels = features // (PATCH * PATCH)
    squares = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height, width, channels)


def noise(key: Key[Array, ""], height: int, width: int, channels: int) -> Float[Array, "I P"]:
    """Unit Gaussian noise for one image, as tokens.

    Drawn in float32 on the latent grid from the image's own key: neither the batch that the image
    is in nor the model's dtype changes it.

    Args:
      key: one typed JAX random key.
      height, width, channels: of the latent grid.

    Returns:
      (H/2 * W/2, C * 4) float32.
    """
    grid = jax.random.normal(key, (1, height, width, channels), jnp.float32)
    return pack(grid)[0]
