"""The denoising loop: the transformer along a noise schedule, state on the device throughout.

What depends on the time step but not on the image (the modulation vectors of all blocks) is
computed for all steps at once before the loop; a step is then one call of one compiled program,
and the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flux_jax.functional import ModuleFunction
from flux_jax.prompts import PromptEmbeds
from flux_jax.rope import image_ids, text_ids
from flux_jax.scheduler import Schedule, euler_step, predict_clean
from flux_jax.transformer import FluxTransformer, Modulations


def _schedule_modulations(
    transformer: FluxTransformer,
    timesteps: Float[Array, " S"],
    pooled: Float[Array, "B V"],
    guidance: Float[Array, ""] | None,
) -> Modulations:
    """The modulation vectors of S steps for B prompts: each array gains a leading axis S."""
    steps, batch = timesteps.shape[0], pooled.shape[0]
    rows = steps * batch
    vec = transformer.conditioning(
        jnp.repeat(timesteps, batch),
        jnp.tile(pooled, (steps, 1)),
        None if guidance is None else jnp.full((rows,), guidance),
    )
    mods = transformer.modulations(vec)
    return jax.tree.map(lambda m: m.reshape(steps, batch, *m.shape[1:]), mods)


def _velocity(
    transformer: FluxTransformer,
    latents: Float[Array, "B I P"],
    img_ids: Int[Array, "I A"],
    txt: Float[Array, "B T C"],
    txt_ids: Int[Array, "T A"],
    mods: Modulations,
    step: Int[Array, ""],
) -> Float[Array, "B I P"]:
    """The velocity at one step of the schedule that `mods` was made for, float32."""
    current = jax.tree.map(lambda m: jax.lax.dynamic_index_in_dim(m, step, keepdims=False), mods)
    return transformer.velocity(latents, img_ids, txt, txt_ids, current).astype(jnp.float32)


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


SCHEDULE_MODULATIONS = ModuleFunction(_schedule_modulations)
VELOCITY = ModuleFunction(_velocity)


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

    Yields:
      S times (latents after the step, predicted clean latents), each (B, I, P) float32.
    """
    velocity = VELOCITY.bind(transformer)
    modulations = SCHEDULE_MODULATIONS.bind(transformer)
    guidance = None if guidance_scale is None else np.float32(guidance_scale)
    latents = velocity.place(latents)

    def conditions(prompt: PromptEmbeds) -> tuple[Any, ...]:
        txt, pooled = velocity.place((prompt.prompt_embeds, prompt.pooled_prompt_embeds))
        mods = modulations(schedule.timesteps, pooled, guidance)
        ids = velocity.place((image_ids(*grid), text_ids(txt.shape[1])))
        return ids[0], txt, ids[1], mods

    positive = conditions(embeds)
    opposite = None if negative is None else conditions(negative)
    for step in range(schedule.num_steps):
        index = np.int32(step)
        v = velocity(latents, *positive, index)
        if opposite is not None:
            v = _guide(v, velocity(latents, *opposite, index), np.float32(true_cfg_scale))
        latents, clean = _update(latents, v, schedule.sigmas[step], schedule.sigmas[step + 1])
        yield latents, clean
