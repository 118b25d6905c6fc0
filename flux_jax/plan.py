"""A call's arguments, checked and completed before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flux_jax import arguments
from flux_jax.configs import AutoencoderConfig, FluxConfig, SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.latents import PATCH, check_size, noise
from flux_jax.scheduler import Schedule, make_schedule
from flux_jax.tokenization import DEV_TOKENS, SCHNELL_TOKENS

DEV_STEPS, SCHNELL_STEPS = 28, 4
# Ten times the noise levels that the model has learned.
MOST_STEPS = 10_000

# Of the pipeline's call, what `make_plan` takes, and all images share.
ARGUMENTS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "batch_size",
)

_noise = jax.jit(noise, static_argnums=(1, 2, 3))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What all images of a call share.

    Attributes:
      schedule: the noise levels.
      height, width: pixels.
      grid: image tokens (rows, columns).
      latent_shape: latent pixels and channels (H, W, C).
      guidance_scale: None for a model that takes none.
      true_cfg_scale: above 1 for a second, negative pass.
      max_sequence_length: T5 tokens.
      batch_size: images drawn together, over all devices.
      parts: groups of devices among which they are divided.
      images_per_prompt: images of each prompt.
    """

    schedule: Schedule
    height: int
    width: int
    grid: tuple[int, int]
    latent_shape: tuple[int, int, int]
    guidance_scale: float | None
    true_cfg_scale: float
    max_sequence_length: int
    batch_size: int
    parts: int
    images_per_prompt: int

    @property
    def device_batch_size(self) -> int:
        """Images that a device draws together, which is what rounding depends on."""
        return self.batch_size // self.parts

    @property
    def takes_negative(self) -> bool:
        """Whether a negative prompt has an effect."""
        return self.true_cfg_scale > 1

    @property
    def token_shape(self) -> tuple[int, int]:
        """Image tokens, and channels of each."""
        return self.grid[0] * self.grid[1], self.latent_shape[2] * PATCH * PATCH


def sequence_length(config: FluxConfig, limit: int, requested: int | None) -> int:
    """T5 tokens: what was asked for, or what the model was trained with, within the limit.

    Raises:
      UserError: asked for more than `limit`, the tokenizer's.
    """
    if requested is None:
        return min(DEV_TOKENS if config.guidance_embed else SCHNELL_TOKENS, limit)
    length = arguments.integer("max_sequence_length", requested)
    if length > limit:
        raise UserError(f"max_sequence_length must be at most {limit}, got {length}")
    return length


def make_plan(
    transformer: FluxConfig,
    vae: AutoencoderConfig,
    scheduler: SchedulerConfig,
    *,
    token_limit: int,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 3.5,
    true_cfg_scale: float = 1.0,
    max_sequence_length: int | None = None,
    batch_size: int | None = None,
    num_images_per_prompt: int = 1,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a call; None stands for the model's own value.

    Args:
      transformer, vae, scheduler: the models' configurations.
      token_limit: the most tokens T5's tokenizer gives.
      height, width, and the rest: as in the pipeline's call.
      mesh: sizes of the axes of the devices' mesh, if there is one.

    Raises:
      UserError: an argument out of its range, or what the mesh cannot divide.
    """
    height = arguments.integer("height", vae.sample_size if height is None else height)
    width = arguments.integer("width", vae.sample_size if width is None else width)
    side = vae.downscale * PATCH
    check_size(height, width, side)
    grid = (height // side, width // side)
    if num_inference_steps is None:
        num_inference_steps = DEV_STEPS if transformer.guidance_embed else SCHNELL_STEPS
    steps = arguments.integer("num_inference_steps", num_inference_steps, most=MOST_STEPS)
    guidance = arguments.scale("guidance_scale", guidance_scale)
    parts = 1 if mesh is None else mesh.get("data", 1)
    batch = arguments.integer("batch_size", parts if batch_size is None else batch_size)
    if batch % parts:
        raise UserError(f"batch_size must be a multiple of the mesh's data={parts}, got {batch}")
    length = sequence_length(transformer, token_limit, max_sequence_length)
    pieces = 1 if mesh is None else mesh.get("sequence", 1)
    for count, what in (
        (transformer.num_heads, "attention heads"),
        (grid[0] * grid[1], f"image tokens of {width} x {height} pixels"),
        (length, "text tokens (max_sequence_length)"),
    ):
        if count % pieces:
            raise UserError(f"the mesh's sequence={pieces} does not divide the {count} {what}")
    return Plan(
        schedule=make_schedule(scheduler, steps, grid[0] * grid[1]),
        height=height,
        width=width,
        grid=grid,
        latent_shape=(grid[0] * PATCH, grid[1] * PATCH, vae.latent_channels),
        guidance_scale=guidance if transformer.guidance_embed else None,
        true_cfg_scale=arguments.scale("true_cfg_scale", true_cfg_scale),
        max_sequence_length=length,
        batch_size=batch,
        parts=parts,
        images_per_prompt=arguments.integer("num_images_per_prompt", num_images_per_prompt),
    )


def initial_noise(
    seed: Any, key: Any, latents: Any, count: int, plan: Plan
) -> tuple[tuple[int | None, ...], Callable[[Sequence[int]], Array]]:
    """Where each of `count` images starts.

    Args:
      seed, key, latents: as in the pipeline's call; at most one of them.
      count: number of images.
      plan: the call.

    Returns:
      (seeds, noise): each image's seed or None, and a function from indices of images to their
      initial noise (B, I, P) float32.

    Raises:
      UserError: more than one source of noise, or one that does not fit.
    """
    if latents is not None:
        if seed is not None or key is not None:
            raise UserError("pass latents, or a seed or key to draw them from, not both")
        given = arguments.initial_latents(latents, (count, *plan.token_shape))
        return (None,) * count, lambda indices: jax.device_put(given[list(indices)])
    seeds, keys = arguments.seeds_and_keys(seed, key, count)

    def drawn(indices: Sequence[int]) -> Array:
        # Once each: an image that fills up a batch has its key used already.
        once = {index: _noise(keys[index], *plan.latent_shape) for index in dict.fromkeys(indices)}
        return jnp.stack([once[index] for index in indices])

    return seeds, drawn
