"""This port against PyTorch on one checkpoint: error by component, and one image from one noise.

One component at a time and one framework at a time: the memory needed is that of the largest
component, once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Generator, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flux_jax import arguments, images
from flux_jax.autoencoder import DECODE
from flux_jax.checkpoint import Checkpoint, inspect_checkpoint, load_checkpoint
from flux_jax.components import TOKENIZERS
from flux_jax.denoise import denoise
from flux_jax.errors import UserError
from flux_jax.functional import ModuleFunction
from flux_jax.images import decode, to_uint8, to_unit_range
from flux_jax.latents import PATCH, check_size, noise, unpack
from flux_jax.loading import check_whole
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.rope import image_ids, text_ids
from flux_jax.scheduler import Schedule, make_schedule
from flux_jax.tokenization import load_tokenizer, max_length, tokenize

# What the text encoders are compared on, and both sides draw.
PROMPT = "a red circle above a blue square"
# Largest relative error that rounding explains.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
SIGMA_LIMIT = 1e-6
PSNR_LIMIT = 45.0
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")
# diffusers rounds time and guidance to the model's type before it multiplies them by 1000: these
# survive that in bfloat16, so that both sides compute the same thing.
TIMES, GUIDANCE = (1.0, 0.5, 0.25), 4.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One compared quantity.

    Attributes:
      name: what was compared.
      value: an error, or decibels for the image.
      limit: the largest error, or least decibels, that passes; None if nothing is demanded.
      unit: "relative error", "absolute error" or "dB".
    """

    name: str
    value: float
    limit: float | None
    unit: str = "relative error"

    @property
    def passed(self) -> bool:
        """Whether the value is within its limit; NaN is not."""
        if self.limit is None:
            return not math.isnan(self.value)
        return self.value >= self.limit if self.unit == "dB" else self.value <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides draw.

    Attributes:
      dtype: "float32" or "bfloat16".
      grid: image tokens (rows, columns).
      side: pixels of an image token.
      schedule: the noise levels of the image.
      key: of its noise.
    """

    dtype: str
    grid: tuple[int, int]
    side: int
    schedule: Schedule
    key: jax.Array


def relative_error(ours: Any, theirs: Any) -> float:
    """`|ours - theirs| / |theirs|` over all elements, in float64."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def psnr(ours: Any, theirs: Any) -> float:
    """Peak signal-to-noise ratio of two 8-bit images in dB; 99 for equal ones."""
    return float(images.psnr(np.asarray(ours)[None] / 255, np.asarray(theirs)[None] / 255)[0])


def check_installed() -> None:
    """Refuse without the packages to compare with.

    Raises:
      UserError: says how to install them.
    """
    needed = ("torch", "diffusers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"compare needs {' and '.join(missing)}: pip install 'flux-jax[parity]'")


def compare(
    path: str | Path,
    *,
    dtype: str = "float32",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 4,
    seed: int = 0,
) -> Iterator[Finding]:
    """Compare every component of a checkpoint, then one image.

    Args:
      path: a checkpoint in diffusers' layout: folder, Hugging Face repository id or "tiny".
      dtype: "float32" or "bfloat16", for both sides.
      height, width: of the image; the model's own size by default, at most 512.
      num_inference_steps, seed: of the image.

    Yields:
      What was found, as soon as it is.

    Raises:
      UserError: torch or diffusers is missing, the checkpoint is none that they can load, as a
        ternary one, or an argument is out of its range.
    """
    check_installed()
    _, keys = arguments.seeds_and_keys(seed, None, 1)
    # All of a repository is fetched here: the reference reads files, and comes first.
    contents = inspect_checkpoint(path)
    if not (contents.path / "model_index.json").exists():
        raise UserError(f"{path} is no pipeline in diffusers' layout, with model_index.json")
    scheduler = check_whole(str(path), contents)
    packed = [name for name, part in contents.components.items() if part.quantized]
    if packed:
        raise UserError(
            f"{path}: diffusers cannot load a quantised {', '.join(packed)}; compare the "
            "checkpoint that it was made from"
        )
    config: Any = contents.components["vae"].config
    side = PATCH * config.downscale
    height, width = (min(512, config.sample_size) if n is None else n for n in (height, width))
    check_size(height, width, side)
    grid = (height // side, width // side)
    settings = Settings(
        dtype=dtype,
        grid=grid,
        side=side,
        schedule=make_schedule(scheduler, num_inference_steps, grid[0] * grid[1]),
        key=keys[0],
    )
    # Late: torch is there only now.
    from flux_jax.reference import Reference

    path = contents.path
    checkpoint = load_checkpoint(path, components=["vae"], dtype=jnp.dtype(dtype))
    vae = checkpoint.modules["vae"]
    theirs = Reference(path, dtype)
    embeds = yield from _compare_text(path, checkpoint, theirs, settings)
    yield from _compare_schedule(theirs, settings)
    ends = yield from _compare_transformer(path, checkpoint, theirs, settings, embeds)
    yield from _compare_vae(vae, theirs, settings, ends)


def format_line(finding: Finding) -> str:
    """One line of the table that the command prints."""
    is_image = finding.unit == "dB"
    value = f"{finding.value:.1f}" if is_image else f"{finding.value:.2e}"
    if finding.limit is None:
        verdict = ""
    else:
        limit = f"at least {finding.limit:.0f}" if is_image else f"at most {finding.limit:.0e}"
        verdict = f"{'ok' if finding.passed else 'FAILED'} ({limit})"
    return f"{finding.name:26}{value:>10} {finding.unit:16}{verdict}".rstrip()


def report(model: str, dtype: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings as JSON values, with the versions of both sides.

    A value that JSON cannot hold is null: an error that is not a number.
    """

    def entry(finding: Finding) -> dict[str, Any]:
        value = finding.value if math.isfinite(finding.value) else None
        return {**dataclasses.asdict(finding), "value": value, "passed": finding.passed}

    return {
        "model": model,
        "dtype": dtype,
        "passed": all(finding.passed for finding in findings),
        "findings": [entry(finding) for finding in findings],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sides(Generic[T]):
    """What each side computed, from which it goes on by itself."""

    ours: T
    theirs: T


def _compare_text(
    path: str | Path, checkpoint: Checkpoint, theirs: Any, settings: Settings
) -> Generator[Finding, None, Sides[PromptEmbeds]]:
    """Yields findings, returns the embeddings."""

    def ours(name: str, ids: np.ndarray) -> jax.Array:
        modules = load_checkpoint(path, components=[name], dtype=jnp.dtype(settings.dtype)).modules
        return _TEXT.bind(modules[name])(ids)

    tokenizer, tokenizer_2 = (
        load_tokenizer(checkpoint.tokenizer_paths[name]) for name in TOKENIZERS
    )
    limit, prompts = LIMITS[settings.dtype], [PROMPT]
    ids = tokenize(tokenizer, prompts, max_length(tokenizer, 77), encoder="CLIP")
    pooled = ours("text_encoder", ids), theirs.clip(ids)
    yield Finding("text_encoder (CLIP)", relative_error(*pooled), limit)
    ids = tokenize(tokenizer_2, prompts, max_length(tokenizer_2), encoder="T5")
    states = ours("text_encoder_2", ids), theirs.t5(ids)
    yield Finding("text_encoder_2 (T5)", relative_error(*states), limit)
    return Sides(
        *(
            PromptEmbeds(prompts=(PROMPT,), prompt_embeds=t5, pooled_prompt_embeds=clip)
            for t5, clip in zip(map(jnp.asarray, states), map(jnp.asarray, pooled), strict=True)
        )
    )


def _compare_schedule(theirs: Any, settings: Settings) -> Iterator[Finding]:
    tokens = settings.grid[0] * settings.grid[1]
    expected = theirs.sigmas(settings.schedule.num_steps, tokens)
    error = float(np.abs(settings.schedule.sigmas - expected).max())
    yield Finding("scheduler", error, SIGMA_LIMIT, "absolute error")


def _compare_transformer(
    path: Path,
    checkpoint: Checkpoint,
    theirs: Any,
    settings: Settings,
    embeds: Sides[PromptEmbeds],
) -> Generator[Finding, None, Sides[Any]]:
    """Yields findings, returns the latents that sampling ended in."""
    rows, columns = settings.grid
    channels = checkpoint.modules["vae"].config.latent_channels
    start = noise(settings.key, rows * PATCH, columns * PATCH, channels)[None]
    velocities, their_latents = theirs.transformer(
        np.asarray(start),
        settings.grid,
        *(np.asarray(x, np.float32) for x in _arrays(embeds.theirs)),
        times=TIMES,
        guidance=GUIDANCE,
        steps=settings.schedule.num_steps,
        side=settings.side,
    )
    loaded = load_checkpoint(path, components=["transformer"], dtype=jnp.dtype(settings.dtype))
    transformer = loaded.modules["transformer"]
    guidance = GUIDANCE if transformer.config.guidance_embed else None
    velocity = _VELOCITY.bind(transformer)
    txt, pooled = _arrays(embeds.theirs)
    ids = image_ids(rows, columns), text_ids(txt.shape[1])
    for time, expected in zip(TIMES, velocities, strict=True):
        scale = None if guidance is None else np.full(1, guidance, np.float32)
        found = velocity(start, ids[0], txt, ids[1], np.full(1, time, np.float32), pooled, scale)
        name, limit = f"transformer, t = {time}", LIMITS[settings.dtype]
        yield Finding(name, relative_error(found, expected), limit)
    *_, (our_latents, _) = denoise(
        transformer, settings.schedule, start, settings.grid, embeds.ours, guidance_scale=guidance
    )
    yield Finding("latents of the image", relative_error(our_latents, their_latents), None)
    return Sides(our_latents, their_latents)


def _compare_vae(vae: Any, theirs: Any, settings: Settings, ends: Sides[Any]) -> Iterator[Finding]:
    rows, columns = settings.grid
    size = (rows * PATCH, columns * PATCH)
    latents = np.asarray(unpack(jnp.asarray(ends.theirs), *size))
    image = _test_image(rows * settings.side, columns * settings.side)
    their_mean, their_image = theirs.vae(image, latents)
    limit = LIMITS[settings.dtype]
    yield Finding("vae, encode", relative_error(_ENCODE.bind(vae)(image), their_mean), limit)
    yield Finding("vae, decode", relative_error(DECODE.bind(vae)(latents), their_image), limit)
    our_picture = to_uint8(decode(vae, ends.ours, settings.grid, tiled=False))
    their_picture = to_uint8(to_unit_range(their_image))
    # In bfloat16 each side rounds the latents of every step its own way.
    limit = PSNR_LIMIT if settings.dtype == "float32" else None
    yield Finding("image", psnr(our_picture[0], their_picture[0]), limit, "dB")


def _arrays(embeds: PromptEmbeds) -> tuple[Any, Any]:
    return embeds.prompt_embeds, embeds.pooled_prompt_embeds


def _test_image(height: int, width: int) -> np.ndarray:
    """Waves of several lengths in each channel, (1, height, width, 3) in [-1, 1], float32."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / (3 + 4 * c)) * np.cos(y / (5 + 7 * c)) for c in range(3)]
    return np.stack(waves, axis=-1)[None].astype(np.float32)


def _encoded(encoder: Any, ids: jax.Array) -> jax.Array:
    """CLIP's pooled embedding, or T5's hidden states."""
    output = encoder(ids)
    return getattr(output, "pooled", output)


def _velocity(transformer: Any, *inputs: Any) -> jax.Array:
    return transformer(*inputs)


def _mean(vae: Any, image: jax.Array) -> jax.Array:
    return vae.moments(image)[0]


_TEXT, _VELOCITY = ModuleFunction(_encoded), ModuleFunction(_velocity)
_ENCODE = ModuleFunction(_mean)
