"""Pictures from the networks in training: the whole Euler loop in one compiled function."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from examples.tiny_flux.flow import FlowTrainer
from flux_jax.autoencoder import Autoencoder
from flux_jax.configs import AutoencoderConfig, SchedulerConfig
from flux_jax.latents import unpack
from flux_jax.scheduler import make_schedule
from flux_jax.tree import Flat

# The tiny model's grid of 64 tokens takes the place of FLUX.1's smallest of 256.
SCHEDULER = SchedulerConfig(base_image_seq_len=64, max_image_seq_len=1024)


class Sampler:
    """Draws batches of captions with given weights.

    Args:
      trainer: whose networks to use.
      rebuild_autoencoder: from `split_flat`.
      config: of the autoencoder, with the measured shift and scale.
      steps: Euler steps.
      batch_size: rows a call; a last, smaller batch is padded.
    """

    def __init__(
        self,
        trainer: FlowTrainer,
        rebuild_autoencoder: Callable[[Flat], Autoencoder],
        config: AutoencoderConfig,
        *,
        steps: int = 28,
        batch_size: int = 64,
    ):
        self.batch_size = batch_size
        side = config.sample_size // config.downscale
        schedule = make_schedule(SCHEDULER, steps, (side // 2) ** 2)
        sigmas = jnp.asarray(schedule.sigmas)

        def draw(
            params: Flat,
            autoencoder: Flat,
            t5_ids: Int[Array, "B T"],
            clip_ids: Int[Array, "B S"],
            guidance: Float[Array, ""],
            key: Array,
        ) -> Float[Array, "B H W 3"]:
            model = trainer.model(params)
            text = model.encode(t5_ids, clip_ids)
            count = t5_ids.shape[0]
            tokens = jax.random.normal(key, (count, (side // 2) ** 2, config.latent_channels * 4))
            scale = jnp.full((count,), guidance)

            def one(i: Int[Array, ""], x: Float[Array, "B I P"]) -> Float[Array, "B I P"]:
                velocity = model.velocity(x, text, jnp.full((count,), sigmas[i]), scale)
                return x + (sigmas[i + 1] - sigmas[i]) * velocity

            tokens = jax.lax.fori_loop(0, steps, one, tokens)
            vae = rebuild_autoencoder(autoencoder)
            return vae.decode(unpack(tokens, side, side)).astype(jnp.float32)

        self._draw = jax.jit(draw)

    def __call__(
        self,
        params: Flat,
        autoencoder: Flat,
        t5_ids: Int[np.ndarray, "N T"],
        clip_ids: Int[np.ndarray, "N S"],
        *,
        guidance: float,
        seed: int,
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """One picture a caption."""
        pictures = []
        for start in range(0, len(t5_ids), self.batch_size):
            rows = np.arange(start, start + self.batch_size) % len(t5_ids)
            key = jax.random.fold_in(jax.random.key(seed), start)
            batch = self._draw(
                params,
                autoencoder,
                jnp.asarray(t5_ids[rows], jnp.int32),
                jnp.asarray(clip_ids[rows], jnp.int32),
                jnp.float32(guidance),
                key,
            )
            bytes_ = jnp.clip(jnp.round((batch + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
            pictures.append(np.asarray(bytes_)[: len(t5_ids) - start])
        return np.concatenate(pictures)
