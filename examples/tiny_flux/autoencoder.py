"""Training the tiny model's autoencoder on rendered scenes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from flux_jax.autoencoder import Autoencoder
from flux_jax.composition.render import render
from flux_jax.composition.scene import SceneArrays
from flux_jax.configs import AutoencoderConfig
from flux_jax.tree import Flat, split_flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """How the autoencoder is trained.

    Attributes:
      steps, batch_size: updates, and pictures of each.
      learning_rate: at its highest.
      kl_weight: of the KL term per latent value against the mean absolute pixel error. It keeps
        the latents near unit variance and the posterior wide enough that the decoder forgives
        the small errors of a sampler.
    """

    steps: int = 5000
    batch_size: int = 256
    learning_rate: float = 2e-3
    kl_weight: float = 3e-4


def raw_config() -> AutoencoderConfig:
    """The tiny autoencoder before its latents have been measured: no shift, no scale."""
    return dataclasses.replace(AutoencoderConfig.tiny(), scaling_factor=1.0, shift_factor=0.0)


def _cast(tree: Flat, dtype: Any) -> Flat:
    return {name: value.astype(dtype) for name, value in tree.items()}


def _pick(scenes: SceneArrays, rows: Int[Array, " B"]) -> SceneArrays:
    return SceneArrays(*(field[rows] for field in scenes))


class AutoencoderTrainer:
    """Owns the compiled step; the parameters and the optimiser's state go through it.

    Args:
      settings: how to train.
      scenes: pictures to draw, as device arrays.
      mesh: a mesh with a `data` axis; the batch is split over it, everything else is replicated.
      seed: of the weights and of every step's draws.
    """

    def __init__(
        self, settings: AutoencoderTraining, scenes: SceneArrays, mesh: Mesh, *, seed: int
    ):
        self.settings = settings
        self.rows = NamedSharding(mesh, PartitionSpec("data"))
        replicated = NamedSharding(mesh, PartitionSpec())
        self.scenes = jax.device_put(SceneArrays(*map(np.asarray, scenes)), replicated)
        model = Autoencoder(raw_config(), dtype=jnp.float32, rngs=nnx.Rngs(seed))
        self.rebuild, params = split_flat(model)
        self.params: Flat = jax.device_put(params, replicated)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, settings.learning_rate, min(200, settings.steps // 10), settings.steps
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4)
        )
        self.state = jax.jit(self.optimizer.init, out_shardings=replicated)(self.params)
        self.key = jax.random.key(seed)
        self._step = jax.jit(self._update, donate_argnums=(0, 1), out_shardings=replicated)

    def loss(
        self, params: Flat, images: Float[Array, "B H W 3"], key: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Pixel error plus KL; also the mean squared pixel error."""
        model = self.rebuild(_cast(params, jnp.bfloat16))
        mean, log_variance = (
            part.astype(jnp.float32) for part in model.moments(images.astype(jnp.bfloat16))
        )
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        noise = jax.random.normal(key, mean.shape)
        latents = mean + jnp.exp(0.5 * log_variance) * noise
        decoded = model.decode(latents.astype(jnp.bfloat16)).astype(jnp.float32)
        error = decoded - images
        squared = jnp.mean(jnp.square(error))
        return jnp.mean(jnp.abs(error)) + squared + self.settings.kl_weight * kl, squared

    def _update(
        self, params: Flat, state: optax.OptState, scenes: SceneArrays, index: Int[Array, ""]
    ) -> tuple[Flat, optax.OptState, Float[Array, ""], Float[Array, ""]]:
        row_key, noise_key = jax.random.split(jax.random.fold_in(self.key, index))
        total = scenes.background.shape[0]
        rows = jax.random.randint(row_key, (self.settings.batch_size,), 0, total)
        rows = jax.lax.with_sharding_constraint(rows, self.rows)
        images = render(_pick(scenes, rows))
        (loss, squared), grads = jax.value_and_grad(self.loss, has_aux=True)(
            params, images, noise_key
        )
        updates, state = self.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, squared

    def step(self, index: int) -> tuple[Array, Array]:
        """One update; returns the loss and the mean squared pixel error, still on the device."""
        self.params, self.state, loss, squared = self._step(
            self.params, self.state, self.scenes, jnp.int32(index)
        )
        return loss, squared


def psnr(mean_squared_error: float) -> float:
    """Decibels for images in [-1, 1]."""
    return 10.0 * math.log10(4.0 / max(mean_squared_error, 1e-12))
