"""Train a LoRA for the shipped model, beside its bf16 weights or its student's packed ones.

    python -m examples.tiny_flux.style --out night.safetensors
    python -m examples.tiny_flux.style --model tiny-ternary --out night-ternary.safetensors

The style is night: scenes are drawn with a quarter of their red, 0.3 of their green and 0.55 of
their blue, under captions that do not say so. Only the LoRA's factors are trained, by flow matching
and Adam; the weights stay as they are, those of a packed student at two bits. Five minutes on two
CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from examples.tiny_flux.scenes import sample_captions
from flux_jax import FluxPipeline, LoRA, image_ids, text_ids
from flux_jax.composition.render import render
from flux_jax.composition.scene import SceneArrays
from flux_jax.errors import UserError, exit_on_user_error
from flux_jax.latents import pack
from flux_jax.lora import LowRank, linear_shapes

NIGHT = (0.25, 0.3, 0.55)
SCENES = 768
ENCODED = 64


def new_lora(config: Any, rank: int) -> LoRA:
    """Of the attention and MLP of every block; it changes nothing yet."""
    rng = np.random.default_rng(0)
    layers = {
        name: LowRank(
            (rng.standard_normal((rank, k)) / np.sqrt(k)).astype(np.float32),
            np.zeros((n, rank), np.float32),
        )
        for name, (n, k) in linear_shapes(config).items()
        if name.startswith(("double_blocks.", "single_blocks.")) and "mod" not in name
    }
    return LoRA(path="a new one", layers=layers)


def at_night(pipe: FluxPipeline, scenes: SceneArrays) -> Float[np.ndarray, "N I P"]:
    """The scenes as image tokens."""
    graph, state = nnx.split(pipe.vae)

    @jax.jit
    def encode(state: Any, part: SceneArrays) -> Float[Array, "B I P"]:
        # Pixels are in [-1, 1].
        dark = (render(part) + 1) * jnp.asarray(NIGHT)[None, None, None] - 1
        return pack(nnx.merge(graph, state).encode(dark.astype(jnp.bfloat16)))

    parts = [
        SceneArrays(*(np.asarray(field[start : start + ENCODED]) for field in scenes))
        for start in range(0, SCENES, ENCODED)
    ]
    return np.concatenate([np.asarray(encode(state, part), np.float32) for part in parts])


def train(pipe: FluxPipeline, *, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train the LoRA beside the pipeline's weights; it stays there."""
    texts, scenes = sample_captions(5, 0, SCENES)
    embeds, latents = pipe.encode_prompt(texts), at_night(pipe, scenes)
    side = int(latents.shape[1] ** 0.5)
    ids = jnp.asarray(image_ids(side, side)), jnp.asarray(text_ids(embeds.prompt_embeds.shape[1]))
    dtype = pipe.transformer.dtype

    def is_factor(path: Any, value: Any) -> bool:
        return path[-1] in ("lora_a", "lora_b")

    graph, factors, rest = nnx.split(pipe.transformer, is_factor, ...)
    factors = jax.tree.map(lambda x: x.astype(jnp.float32), factors)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(20, steps // 2), steps)
    optimizer = optax.adam(schedule)

    @jax.jit
    def step(
        factors: Any,
        moments: Any,
        rest: Any,
        clean: Float[Array, "B I P"],
        txt: Float[Array, "B T C"],
        pooled: Float[Array, "B V"],
        key: Key[Array, ""],
    ) -> tuple[Any, Any, Float[Array, ""]]:
        noise_key, time_key, guidance_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, clean.shape)
        # Mostly near the noise, where a picture's light is decided.
        sigma = 1 - jax.random.uniform(time_key, (batch_size,)) ** 2
        guidance = jax.random.uniform(guidance_key, (batch_size,), minval=1.0, maxval=5.0)
        x = clean + sigma[:, None, None] * (noise - clean)

        def loss(factors: Any) -> Float[Array, ""]:
            model = nnx.merge(graph, jax.tree.map(lambda f: f.astype(dtype), factors), rest)
            found = model(x.astype(dtype), ids[0], txt, ids[1], sigma, pooled, guidance)
            return jnp.mean(jnp.square(found.astype(jnp.float32) - (noise - clean)))

        value, gradient = jax.value_and_grad(loss)(factors)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(factors, updates), moments, value

    rng, moments = np.random.default_rng(0), optimizer.init(factors)
    for number in (bar := tqdm(range(steps), unit="step")):
        rows = rng.integers(0, SCENES, batch_size)
        text = embeds.prompt_embeds[rows], embeds.pooled_prompt_embeds[rows]
        key = jax.random.key(number)
        factors, moments, loss = step(factors, moments, rest, latents[rows], *text, key)
        bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
    nnx.update(pipe.transformer, jax.tree.map(lambda f: f.astype(dtype), factors))


def main(
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: Annotated[str, typer.Option(help="tiny, or tiny-ternary.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes of a step.")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-3,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Train a LoRA that turns scenes to night."""
    with exit_on_user_error():
        if out.exists() and not force:
            raise UserError(f"{out} exists: --force replaces it")
        pipe = FluxPipeline.from_pretrained(model)
        pipe.add_lora(new_lora(pipe.transformer.config, rank))
        train(pipe, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
        pipe.save_lora(out, force=force)


if __name__ == "__main__":
    typer.run(main)
