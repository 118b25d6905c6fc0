"""Training the tiny model's transformer and both text encoders, jointly, by flow matching.

Two phases. In the first the model learns the velocity `noise - image` with the guidance input
fixed at 1 and a tenth of the captions emptied. In the second, guidance distillation as FLUX.1-dev
had it, the frozen result of the first phase is the teacher: for a guidance scale w drawn at random
the target is `uncond + w * (cond - uncond)`, so that one pass does what took two.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from examples.tiny_flux.optimizer import stacked_muon
from examples.tiny_flux.scenes import CLIP_LENGTH, T5_LENGTH
from flux_jax.clip import CLIPTextEncoder
from flux_jax.configs import CLIPTextConfig, FluxConfig, T5Config
from flux_jax.kernels import leave_to_xla
from flux_jax.rope import image_ids, text_ids
from flux_jax.t5 import T5Encoder
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import Flat, split_flat

# 128 x 128 pixels are 16 x 16 latents are 8 x 8 tokens.
IMAGE_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """How the transformer and the text encoders are trained.

    Attributes:
      steps, guidance_steps: of the two phases.
      batch_size: captions of a step.
      learning_rate, guidance_learning_rate: of each phase, at their highest.
      warmup: steps over which the rate rises; a third of them in the second phase.
      decay: share of each phase, at its end, over which the learning rate falls to zero.
      drop_caption: share of captions replaced by the empty one.
      time_shift: noise levels are drawn as `sigmoid(N(log(time_shift), 1))`; a fifth uniformly.
      max_guidance: the second phase draws w uniformly from [1, max_guidance].
      ema: decay of the average of the weights, which is what is kept.
    """

    steps: int = 20_000
    guidance_steps: int = 2_000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    guidance_learning_rate: float = 5e-4
    warmup: int = 300
    decay: float = 0.4
    drop_caption: float = 0.1
    time_shift: float = 1.6
    max_guidance: float = 6.0
    ema: float = 0.999


class Captioned(NamedTuple):
    """The training set on the device.

    Attributes:
      latents: (N, I, P) image tokens, scaled.
      t5_ids: (N, T) caption tokens, padded.
      clip_ids: (N, S) caption tokens, padded.
      empty_t5_ids, empty_clip_ids: the tokens of the empty caption.
    """

    latents: Float[Array, "N I P"]
    t5_ids: Int[Array, "N T"]
    clip_ids: Int[Array, "N S"]
    empty_t5_ids: Int[Array, " T"]
    empty_clip_ids: Int[Array, " S"]


class TextAndFlow(nnx.Module):
    """The three networks that are trained together."""

    def __init__(self, t5: T5Config, clip: CLIPTextConfig, flux: FluxConfig, *, rngs: nnx.Rngs):
        self.text_encoder_2 = T5Encoder(t5, dtype=jnp.float32, rngs=rngs)
        self.text_encoder = CLIPTextEncoder(clip, dtype=jnp.float32, rngs=rngs)
        self.transformer = FluxTransformer(flux, dtype=jnp.float32, rngs=rngs)
        # Trained on several devices.
        leave_to_xla(self.transformer)

    def encode(
        self, t5_ids: Int[Array, "B T"], clip_ids: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B T K"], Float[Array, "B P"]]:
        """T5 embeddings and the pooled CLIP embedding."""
        _, pooled = self.text_encoder(clip_ids)
        return self.text_encoder_2(t5_ids), pooled

    def velocity(
        self,
        tokens: Float[Array, "B I P"],
        text: tuple[Float[Array, "B T K"], Float[Array, "B P"]],
        times: Float[Array, " B"],
        guidance: Float[Array, " B"],
    ) -> Float[Array, "B I P"]:
        """The velocity in float32."""
        side = round(tokens.shape[1] ** 0.5)
        grid = jnp.asarray(image_ids(side, side))
        words = jnp.asarray(text_ids(text[0].shape[1]))
        out = self.transformer(tokens, grid, text[0], words, times, text[1], guidance)
        return out.astype(jnp.float32)


def draw_times(key: Array, count: int, shift: float) -> Float[Array, " count"]:
    """Noise levels: logit-normal, shifted towards noise, and a fifth uniform."""
    normal_key, uniform_key, choice_key = jax.random.split(key, 3)
    logits = jax.random.normal(normal_key, (count,)) + jnp.log(shift)
    uniform = jax.random.uniform(uniform_key, (count,))
    pick = jax.random.bernoulli(choice_key, 0.2, (count,))
    return jnp.where(pick, uniform, jax.nn.sigmoid(logits))


def trapezoid(peak: float, step: int, steps: int, warmup: int, decay: float) -> float:
    """The learning rate at a step (from 1): linear warm-up, constant, linear decay to zero.

    Args:
      peak: the constant.
      step, steps: where we are, and of how many.
      warmup: steps of the warm-up.
      decay: share of all steps, at their end, over which the rate falls.
    """
    falling = max(decay * steps, 1.0)
    return peak * min(1.0, step / max(warmup, 1), (steps - step) / falling)


class FlowTrainer:
    """Owns the two compiled steps.

    Args:
      settings: how to train.
      configs: (T5, CLIP, transformer).
      mesh: a mesh with a `data` axis; the batch is split over it, everything else is replicated.
      seed: of the weights and of every step's draws.
    """

    def __init__(
        self,
        settings: FlowTraining,
        configs: tuple[T5Config, CLIPTextConfig, FluxConfig],
        mesh: Mesh,
        *,
        seed: int,
    ):
        self.settings = settings
        self.key = jax.random.key(seed)
        self.batch_sharding = NamedSharding(mesh, PartitionSpec("data"))
        replicated = NamedSharding(mesh, PartitionSpec())
        model = TextAndFlow(*configs, rngs=nnx.Rngs(seed))
        self.rebuild, params = split_flat(model)
        self.params: Flat = jax.device_put(params, replicated)
        self.ema: Flat = jax.tree.map(jnp.copy, self.params)
        self.teacher: Flat | None = None
        self.optimizer = stacked_muon()
        # One placement for what goes round the loop, or the second step would compile again.
        self._init = jax.jit(self.optimizer.init, out_shardings=replicated)
        self.state = self._init(self.params)
        options: dict[str, Any] = {"donate_argnums": (0, 1, 2), "out_shardings": replicated}
        self._flow_step = jax.jit(self._update_flow, **options)
        self._guidance_step = jax.jit(self._update_guidance, **options)

    def model(self, params: Flat) -> TextAndFlow:
        """The three networks in bf16 with these parameters."""
        return self.rebuild({name: value.astype(jnp.bfloat16) for name, value in params.items()})

    def _batch(
        self, data: Captioned, index: Int[Array, ""]
    ) -> tuple[tuple[Array, Array], Array, Array, Array, Array]:
        """Captions, noisy tokens, plain target, times and a key for what else is drawn."""
        count = self.settings.batch_size
        keys = jax.random.split(jax.random.fold_in(self.key, index), 5)
        rows = jax.random.randint(keys[0], (count,), 0, data.latents.shape[0])
        rows = jax.lax.with_sharding_constraint(rows, self.batch_sharding)
        drop = jax.random.bernoulli(keys[1], self.settings.drop_caption, (count, 1))
        t5_ids = jnp.where(drop, data.empty_t5_ids[None], data.t5_ids[rows]).astype(jnp.int32)
        clip_ids = jnp.where(drop, data.empty_clip_ids[None], data.clip_ids[rows])
        clean = data.latents[rows].astype(jnp.float32)
        noise = jax.random.normal(keys[2], clean.shape)
        times = draw_times(keys[3], count, self.settings.time_shift)
        mix = times[:, None, None]
        noisy = (1.0 - mix) * clean + mix * noise
        return (t5_ids, clip_ids.astype(jnp.int32)), noisy, noise - clean, times, keys[4]

    def _apply(
        self,
        params: Flat,
        ema: Flat,
        state: optax.OptState,
        grads: Flat,
        index: Int[Array, ""],
        rate: Float[Array, ""],
    ) -> tuple[Flat, Flat, optax.OptState]:
        updates, state = self.optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
        # The average forgets its start: early on it follows the weights closely.
        decay = jnp.minimum(self.settings.ema, (1.0 + index) / (10.0 + index))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
        return params, ema, state

    def _update_flow(
        self,
        params: Flat,
        ema: Flat,
        state: optax.OptState,
        data: Captioned,
        index: Array,
        rate: Array,
    ) -> tuple[Flat, Flat, optax.OptState, Array]:
        captions, noisy, target, times, _ = self._batch(data, index)

        def loss_of(values: Flat) -> Float[Array, ""]:
            model = self.model(values)
            guidance = jnp.ones_like(times)
            out = model.velocity(noisy, model.encode(*captions), times, guidance)
            return jnp.mean(jnp.square(out - target))

        loss, grads = jax.value_and_grad(loss_of)(params)
        return *self._apply(params, ema, state, grads, index, rate), loss

    def _update_guidance(
        self,
        params: Flat,
        ema: Flat,
        state: optax.OptState,
        teacher: Flat,
        data: Captioned,
        index: Array,
        rate: Array,
    ) -> tuple[Flat, Flat, optax.OptState, Array]:
        (t5_ids, clip_ids), noisy, target, times, key = self._batch(data, index)
        choice_key, scale_key = jax.random.split(key)
        drawn = jax.random.uniform(
            scale_key, times.shape, minval=1.0, maxval=self.settings.max_guidance
        )
        scale = jnp.where(jax.random.bernoulli(choice_key, 0.8, times.shape), drawn, 1.0)

        guide = self.model(teacher)
        ones = jnp.ones_like(times)
        empty = jnp.broadcast_to(data.empty_t5_ids[None].astype(jnp.int32), t5_ids.shape)
        empty_clip = jnp.broadcast_to(data.empty_clip_ids[None].astype(jnp.int32), clip_ids.shape)
        cond = guide.velocity(noisy, guide.encode(t5_ids, clip_ids), times, ones)
        uncond = guide.velocity(noisy, guide.encode(empty, empty_clip), times, ones)
        guided = uncond + scale[:, None, None] * (cond - uncond)
        target = jnp.where((scale > 1.0)[:, None, None], guided, target)

        def loss_of(values: Flat) -> Float[Array, ""]:
            model = self.model(values)
            out = model.velocity(noisy, model.encode(t5_ids, clip_ids), times, scale)
            return jnp.mean(jnp.square(out - target))

        loss, grads = jax.value_and_grad(loss_of)(params)
        return *self._apply(params, ema, state, grads, index, rate), loss

    def compile(self, count: int) -> None:
        """Compile both steps ahead, for a training set of `count` captions."""
        config = self.rebuild(self.params).transformer.config
        replicated = next(iter(self.params.values())).sharding
        describe = functools.partial(jax.ShapeDtypeStruct, sharding=replicated)
        data = Captioned(
            latents=describe((count, IMAGE_TOKENS, config.in_channels), jnp.bfloat16),
            t5_ids=describe((count, T5_LENGTH), jnp.int16),
            clip_ids=describe((count, CLIP_LENGTH), jnp.int16),
            empty_t5_ids=describe((T5_LENGTH,), jnp.int16),
            empty_clip_ids=describe((CLIP_LENGTH,), jnp.int16),
        )
        trained = (self.params, self.ema, self.state)
        last = (data, jnp.int32(0), jnp.float32(0))
        with ThreadPoolExecutor(2) as pool:
            flow = pool.submit(lambda: self._flow_step.lower(*trained, *last).compile())
            guidance = pool.submit(
                lambda: self._guidance_step.lower(*trained, self.ema, *last).compile()
            )
            self._flow_step, self._guidance_step = flow.result(), guidance.result()

    def step(self, data: Captioned, index: int, rate: float) -> Array:
        """One update of the first phase; returns the loss, still on the device.

        Args:
          data: the training set.
          index: of the step: it selects what is drawn.
          rate: the learning rate.
        """
        self.params, self.ema, self.state, loss = self._flow_step(
            self.params, self.ema, self.state, data, jnp.int32(index), jnp.float32(rate)
        )
        return loss

    def start_guidance(self) -> None:
        """Freeze the averaged weights as the teacher and go on from them."""
        self.teacher = jax.tree.map(jnp.copy, self.ema)
        self.params = jax.tree.map(jnp.copy, self.ema)
        self.state = self._init(self.params)

    def guidance_step(self, data: Captioned, index: int, rate: float) -> Array:
        """One update of the second phase, like `step`."""
        if self.teacher is None:
            raise ValueError("call start_guidance() before guidance_step()")
        trained = (self.params, self.ema, self.state, self.teacher)
        self.params, self.ema, self.state, loss = self._guidance_step(
            *trained, data, jnp.int32(index), jnp.float32(rate)
        )
        return loss
