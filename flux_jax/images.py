"""Decoded arrays to pictures, with the rounding of diffusers' `VaeImageProcessor`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from flux_jax.autoencoder import Autoencoder
from flux_jax.configs import AutoencoderConfig
from flux_jax.errors import UserError
from flux_jax.functional import ModuleFunction
from flux_jax.latents import PATCH, unpack
from flux_jax.partition import constrain
from flux_jax.residence import device_memory

# Above this many pixels a whole decode would need more memory than the denoising loop.
WHOLE_DECODE_PIXELS = 1024 * 1024
# Side of a tile, and what neighbouring tiles share of it, in latent pixels.
TILE, OVERLAP = 64, 16


def _unpack_decode(
    vae: Autoencoder, tokens: Float[Array, "B I P"], *, rows: int, columns: int
) -> Float[Array, "B H W C"]:
    latents = unpack(tokens, rows * PATCH, columns * PATCH)
    return vae.decode(constrain(latents, ("batch", "rows", None, None)))


# The devices that share an image's tokens share its rows: the compiler exchanges what convolutions
# see of their neighbours, and sums what norms and attention see of all.
UNPACK_DECODE = ModuleFunction(
    _unpack_decode,
    arguments=(("batch",),),
    result=("batch",),
    compiler_splits=frozenset({"sequence"}),
)


def decode(
    vae: Autoencoder,
    tokens: Float[Array, "B I P"],
    grid: tuple[int, int],
    *,
    tiled: bool | None = None,
) -> Float[np.ndarray, "B H W C"]:
    """Packed latents to images in [0, 1], float32.

    A device decodes images together up to `WHOLE_DECODE_PIXELS` in all, as far as its free memory
    goes, and beyond that one by one.

    Args:
      vae: the autoencoder.
      tokens: clean latents, packed.
      grid: image tokens (rows, columns).
      tiled: decode in overlapping tiles, which bounds memory and changes the image slightly; None
        does so only for an image above `WHOLE_DECODE_PIXELS`, or one that a device of the
        autoencoder has too little free memory for.

    Raises:
      UserError: the result is not finite.
    """
    rows, columns = grid
    side = PATCH * vae.config.downscale
    pixels = rows * columns * side * side
    if is_tiled_now(vae, pixels, tiled):
        grid_latents = unpack(tokens, rows * PATCH, columns * PATCH)
        decoded = vae.decode_tiled(grid_latents, tile=TILE, overlap=OVERLAP)
    else:
        function = UNPACK_DECODE.bind(vae, rows=rows, columns=columns)
        each = math.ceil(len(tokens) / function.parts)
        together = function.parts * min(each, max(1, _fitting(vae, pixels)))
        on_host = np.asarray(tokens)
        parts = []
        for start in range(0, len(tokens), together):
            some = on_host[start : start + together]
            filled = np.concatenate(
                [some, np.repeat(some[-1:], -len(some) % function.parts, axis=0)]
            )
            parts.append(jax.device_get(function(*function.place(filled)))[: len(some)])
        decoded = (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.float32)
    if not np.isfinite(decoded).all():
        raise UserError(
            "the image came out as NaN or infinity: the weights or the latents overflow "
            f"{vae.decoder.conv_in.weight.dtype}; try dtype float32"
        )
    return to_unit_range(decoded)


def decode_bytes(config: AutoencoderConfig, pixels: int, dtype: Any = jnp.bfloat16) -> int:
    """What one whole decode takes beside the weights, about, in bytes.

    Its widest point is the first block at the image's own resolution: its input and the normalised
    input in `dtype`, that in float32, the result of its convolution and the shortcut.

    Args:
      config: of the autoencoder.
      pixels: of all images that are decoded together.
      dtype: of its weights.
    """
    out, into = (*config.block_out_channels, config.block_out_channels[-1])[:2]
    size = jnp.dtype(dtype).itemsize
    return pixels * ((2 * size + 4) * into + 2 * size * out)


def is_tiled(pixels: int, tiled: bool | None) -> bool:
    """Whether an image is decoded in tiles where memory is not short; `tiled` as in `decode`."""
    return pixels > WHOLE_DECODE_PIXELS if tiled is None else tiled


def is_tiled_now(vae: Autoencoder, pixels: int, tiled: bool | None) -> bool:
    """Whether `decode` works in tiles with the memory that the autoencoder's devices have left.

    Args:
      vae: the autoencoder.
      pixels: of the image.
      tiled: as `decode` takes it.
    """
    return _fitting(vae, pixels) < 1 if tiled is None else tiled


def _fitting(vae: Autoencoder, pixels: int) -> int:
    """How many images of so many pixels a device decodes together; 0 if one is too large."""
    weight: Any = vae.decoder.conv_in.weight.get_value()
    each = decode_bytes(vae.config, pixels, weight.dtype)
    # On a mesh all run one program: the fullest device decides.
    memories = map(device_memory, weight.sharding.addressable_devices)
    rooms = [memory[1] // each for memory in memories if memory is not None]
    return min([WHOLE_DECODE_PIXELS // pixels, *rooms])


def to_unit_range(decoded: Float[np.ndarray, "*B H W C"]) -> Float[np.ndarray, "*B H W C"]:
    """The autoencoder's [-1, 1] to [0, 1], clipped; float32."""
    # In place: each fresh array of a picture's size costs as much as the arithmetic.
    unit = decoded * np.float32(0.5)
    unit += np.float32(0.5)
    return np.clip(unit, 0.0, 1.0, out=unit)


def to_uint8(images: Float[np.ndarray, "*B H W C"]) -> UInt8[np.ndarray, "*B H W C"]:
    """[0, 1] to 0..255, halves to even as NumPy and diffusers round."""
    scaled = images * 255
    return np.rint(scaled, out=scaled).astype(np.uint8)


def to_pil(images: Float[np.ndarray, "B H W C"]) -> list[Image.Image]:
    """One PIL image per row."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def psnr(
    ours: Float[np.ndarray, "B H W C"], theirs: Float[np.ndarray, "B H W C"]
) -> Float[np.ndarray, " B"]:
    """Peak signal-to-noise ratio of images in [0, 1], dB, row by row; equal images have 99."""
    error = np.mean(np.square(ours.astype(np.float64) - theirs), axis=(1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 10**-9.9))
