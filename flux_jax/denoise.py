"""The denoising loop: the transformer along a noise schedule, state on the device throughout.

What depends on the time step but not on the image (the modulation vectors of all blocks) is
computed before the loop, several steps at a time. A step is then one call of a program that knows
neither its number nor how many there are, and the host never waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flux_jax.configs import FluxConfig
from flux_jax.functional import ModuleFunction, SplitModule
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.residence import HostWeights
from flux_jax.rope import image_ids, text_ids
from flux_jax.scheduler import Schedule, euler_step, predict_clean
from flux_jax.sequence import tokens_of_a_part
from flux_jax.transformer import FluxTransformer, Modulations

# Steps whose modulation vectors are computed together: their weights, a quarter of the model, are
# then read once for 8 steps, and one program serves any number of steps.
CHUNK = 8


def _modulations(
    transformer: FluxTransformer,
    timesteps: Float[Array, " S"],
    pooled: Float[Array, "B V"],
    guidance: Float[Array, ""] | None,
) -> Float[Array, "S B N C"]:
    """The modulation vectors of S steps for B prompts, all N of a step in one array."""
    steps, batch = timesteps.shape[0], pooled.shape[0]
    vec = transformer.conditioning(
        jnp.repeat(timesteps, batch),
        jnp.tile(pooled, (steps, 1)),
        None if guidance is None else jnp.full((steps * batch,), guidance),
    )
    joined = jnp.concatenate(jax.tree.leaves(transformer.modulations(vec)), axis=1)
    return joined.reshape(steps, batch, *joined.shape[1:])


def split_modulations(joined: Float[Array, "B N C"], config: FluxConfig) -> Modulations:
    """One step's vectors, as the blocks take them."""
    counts = [*[6, 6] * config.depth, *[3] * config.depth_single_blocks, 2]
    parts = iter(jnp.split(joined, np.cumsum(counts)[:-1], axis=1))
    # In the order of `jax.tree.leaves`, which joined them.
    return Modulations(
        double=tuple((next(parts), next(parts)) for _ in range(config.depth)),
        single=tuple(next(parts) for _ in range(config.depth_single_blocks)),
        final=next(parts),
    )


def _velocity(
    transformer: FluxTransformer,
    latents: Float[Array, "B I P"],
    img_ids: Int[Array, "I A"],
    txt: Float[Array, "B T C"],
    txt_ids: Int[Array, "T A"],
    modulations: Float[Array, "B N C2"],
) -> Float[Array, "B I P"]:
    """The velocity at one step, float32."""
    mods = split_modulations(modulations, transformer.config)
    with tokens_of_a_part(text=txt.shape[1]):
        return transformer.velocity(latents, img_ids, txt, txt_ids, mods).astype(jnp.float32)


@jax.jit
def _at(chunk: Float[Array, "S B N C"], step: Int[Array, ""]) -> Float[Array, "B N C"]:
    return jax.lax.dynamic_index_in_dim(chunk, step, keepdims=False)


@jax.jit
def _update(
    latents: Float[Array, "B I P"],
    velocity: Float[Array, "B I P"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
) -> tuple[Float[Array, "B I P"], Float[Array, "B I P"]]:
    """Next latents, and the clean image predicted at this step."""
    return (
        euler_step(latents, velocity, sigma, sigma_next),
        predict_clean(latents, velocity, sigma),
    )


@jax.jit
def _guide(
    positive: Float[Array, "B I P"], negative: Float[Array, "B I P"], scale: Float[Array, ""]
) -> Float[Array, "B I P"]:
    """Classifier-free guidance: from the negative prompt's velocity past the positive one's."""
    return negative + scale * (positive - negative)


MODULATIONS = ModuleFunction(_modulations, arguments=((), ("batch",), ()), result=(None, "batch"))
VELOCITY = ModuleFunction(
    _velocity,
    arguments=(
        ("batch", "sequence"),
        ("sequence",),
        ("batch", "sequence"),
        ("sequence",),
        ("batch",),
    ),
    result=("batch", "sequence"),
)


def denoise(
    transformer: FluxTransformer,
    schedule: Schedule,
    latents: Float[Array, "B I P"],
    grid: tuple[int, int],
    embeds: PromptEmbeds,
    *,
    guidance_scale: float | None,
    negative: PromptEmbeds | None = None,
    true_cfg_scale: float = 1.0,
    waiting: HostWeights | None = None,
) -> Iterator[tuple[Float[Array, "B I P"], Float[Array, "B I P"]]]:
    """Runs the schedule on a batch, yielding after each step.

    The arrays yielded may still be in computation: whoever looks at the values waits.

    Args:
      transformer: the model.
      schedule: S noise levels.
      latents: noise at the first level, float32.
      grid: image tokens (rows, columns), rows * columns = I.
      embeds: B prompts.
      guidance_scale: for a guidance-distilled model; None for others.
      negative: B prompts to steer away from, at the price of a second pass per step.
      true_cfg_scale: how far; only used with `negative`.
      waiting: what holds the modulation layers' weights, if they are not on the device.

    Yields:
      S times (latents after the step, predicted clean latents), each (B, I, P) float32.
    """
    apart = SplitModule.of(transformer)
    velocity = VELOCITY.bind(apart)
    guidance = None if guidance_scale is None else np.float32(guidance_scale)
    (latents,) = velocity.place(latents)
    ids = image_ids(*grid), text_ids(embeds.prompt_embeds.shape[1])

    def conditions(prompt: PromptEmbeds) -> tuple[tuple[Any, ...], list[Array]]:
        inputs = velocity.place(latents, ids[0], prompt.prompt_embeds, ids[1])[1:]
        # Bound here, and gone after: weights that came from the host must not stay for the loop.
        modulations = MODULATIONS.bind(apart if waiting is None else transformer)
        chunks = []
        for times in _chunks(schedule.timesteps):
            placed = modulations.place(times, prompt.pooled_prompt_embeds, guidance)
            chunks.append(modulations(*placed))
        return inputs, chunks

    def predict(latents: Array, prompt: tuple[tuple[Any, ...], list[Array]], step: int) -> Array:
        inputs, chunks = prompt
        mods = _at(chunks[step // CHUNK], jax.device_put(np.int32(step % CHUNK)))
        return velocity(latents, *inputs, mods)

    with contextlib.nullcontext() if waiting is None else waiting.on_device():
        positive = conditions(embeds)
        opposite = None if negative is None else conditions(negative)
        if waiting is not None:
            jax.block_until_ready((positive, opposite))
    # Placed explicitly, for who forbids other transfers (`jax_transfer_guard`).
    sigmas = [jax.device_put(sigma) for sigma in schedule.sigmas]
    scale = jax.device_put(np.float32(true_cfg_scale))
    for step in range(schedule.num_steps):
        v = predict(latents, positive, step)
        if opposite is not None:
            v = _guide(v, predict(latents, opposite, step), scale)
        latents, clean = _update(latents, v, sigmas[step], sigmas[step + 1])
        yield latents, clean


def _chunks(timesteps: Float[np.ndarray, " S"]) -> list[Float[np.ndarray, " CHUNK"]]:
    """`CHUNK` time steps at a time; the last chunk is filled up with its last step."""
    filler = np.repeat(timesteps[-1:], -len(timesteps) % CHUNK)
    return list(np.concatenate([timesteps, filler]).reshape(-1, CHUNK))
