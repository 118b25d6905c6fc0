"""What the pipeline hands out: its result, and the look at a step that a callback gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from flux_jax.images import to_pil
from flux_jax.metadata import GenerationRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxOutput:
    """What a call returns.

    Attributes:
      images: N PIL images, or an (N, H, W, 3) float32 array in [0, 1] for `output_type="np"`, or
        the packed latents for `output_type="latent"`.
      latents: packed clean latents (N, I, P) float32 if asked for, else None.
      seeds: the seed of each image; None for an image from a key or from the caller's latents.
      records: how each image was drawn, for `flux_jax.metadata.save_png`.
    """

    images: list[Image.Image] | Float[np.ndarray, "N H W C"] | Float[np.ndarray, "N I P"]
    latents: Float[np.ndarray, "N I P"] | None
    seeds: tuple[int | None, ...]
    records: tuple[GenerationRecord, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """What a step's callback may look at: the clean image (x0) predicted at that step.

    Nothing is computed or waited for until it is looked at.

    Attributes:
      latents: packed predicted clean latents (B, I, P) float32, on the device.
      indices: which images of the call these B are.
      decode: such latents to images in [0, 1], (B, H, W, 3) float32.
    """

    latents: Float[Array, "B I P"]
    indices: tuple[int, ...]
    decode: Callable[[Float[Array, "B I P"]], Float[np.ndarray, "B H W C"]] = dataclasses.field(
        repr=False
    )

    def images(self) -> list[Image.Image]:
        """The predicted images, decoded now: as much work as decoding the final ones."""
        return to_pil(self.decode(self.latents))


Callback = Callable[[int, int, Preview], Any]
