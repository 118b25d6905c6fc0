"""Held-out prompts: the same noise drawn by teacher and student, and how far they are apart."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image

from flux_jax import images
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompts import TextEncoders
from flux_jax.transformer import FluxTransformer
from ternary.distillation.placement import on_every_device

# Pairs of a picture grid that stand side by side.
PAIRS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A student's pictures beside the teacher's.

    Attributes:
      images: (N, H, W, 3) in [0, 1], the student's.
      psnr: (N,) dB against the teacher's image from the same noise.
    """

    images: Float[np.ndarray, "N H W 3"]
    psnr: Float[np.ndarray, " N"]

    @property
    def median_psnr(self) -> float:
        """dB, over the images."""
        return float(np.median(self.psnr))


class HeldOut:
    """Draws the held-out prompts with any transformer, always from the same noise.

    Args:
      pipe: the teacher's pipeline.
      embeds: N encoded prompts.
      num_inference_steps, guidance_scale, height, width: as in the pipeline's call.
      batch_size: images drawn together.

    Attributes:
      embeds: the prompts.
      seeds: of their images.
      teacher: (N, H, W, 3) in [0, 1], the teacher's images.
    """

    def __init__(
        self,
        pipe: FluxPipeline,
        embeds: PromptEmbeds,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.5,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
    ):
        vae = on_every_device(pipe.vae)
        self._parts = {"vae": vae, "scheduler": pipe.scheduler, "vae_tiling": pipe.vae_tiling}
        self.embeds = embeds
        self.seeds = list(range(len(embeds.prompts)))
        self._settings = {
            "seed": self.seeds,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "batch_size": batch_size,
        }
        self.teacher = self.draw(pipe.transformer)

    def draw(self, transformer: FluxTransformer) -> Float[np.ndarray, "N H W 3"]:
        """The images of one transformer, in [0, 1]."""
        pipe = FluxPipeline(
            transformer=on_every_device(transformer), text_encoders=TextEncoders(), **self._parts
        )
        output = pipe(self.embeds, output_type="np", progress=False, **self._settings)
        return np.asarray(output.images)

    def compare(self, student: FluxTransformer) -> Comparison:
        """Draw with the student, and measure against the teacher's images."""
        drawn = self.draw(student)
        return Comparison(images=drawn, psnr=images.psnr(drawn, self.teacher))


def grid(
    teacher: Float[np.ndarray, "N H W 3"], student: Float[np.ndarray, "N H W 3"]
) -> Image.Image:
    """Teacher | student side by side, `PAIRS` pairs to a row, white between the pictures."""
    count, height, width, _ = teacher.shape
    between = gap(height)
    bottom, _ = corner(count - 1, height, width, between)
    _, right = corner(PAIRS - 1, height, width, between)
    canvas = np.ones((bottom + height, right + 2 * width + between, 3), np.float32)
    for index in range(count):
        top, left = corner(index, height, width, between)
        for picture in (teacher[index], student[index]):
            canvas[top : top + height, left : left + width] = picture
            left += width + between
    return Image.fromarray(images.to_uint8(canvas))


def gap(height: int) -> int:
    """White pixels between the two pictures of a pair, by their height."""
    return max(2, height // 32)


def corner(index: int, height: int, width: int, between: int) -> tuple[int, int]:
    """Where pair `index` of a grid begins, pixels (top, left).

    Args:
      index: row by row, from 0.
      height, width: of one picture.
      between: white pixels inside a pair, as of `gap`.
    """
    # Wider than inside a pair, so that one sees which two belong together.
    apart = max(2, height // 32) + 2 * between
    return index // PAIRS * (height + apart), index % PAIRS * (2 * width + between + apart)
