"""Train the tiny FLUX that ships with the project, from nothing, on drawn scenes.

    python -m examples.tiny_flux.train --out runs/tiny
    python -m examples.tiny_flux.export runs/tiny flux_jax/assets/tiny

No image is read: scenes are drawn from signed distances and captioned by a grammar. One H200
takes about a quarter of an hour; every device that JAX sees shares the batch. `--smoke` runs all
phases in a minute on a CPU, to see that they work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from examples.tiny_flux.autoencoder import AutoencoderTrainer, AutoencoderTraining, psnr
from examples.tiny_flux.flow import Captioned, FlowTrainer, FlowTraining, trapezoid
from examples.tiny_flux.run_files import Log, load_parts, save_grid, save_parts
from examples.tiny_flux.sample import Sampler
from examples.tiny_flux.scenes import CHUNK, TrainingData, encode_captions, make_training_data
from examples.tiny_flux.tokenizers import CLIP_END, rust_tokenizers
from flux_jax.composition.prompts import load_prompts
from flux_jax.composition.render import render
from flux_jax.composition.scene import SceneArrays
from flux_jax.configs import AutoencoderConfig, CLIPTextConfig, FluxConfig, T5Config
from flux_jax.errors import exit_on_user_error
from flux_jax.latents import pack
from flux_jax.tree import Flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: what is trained on, how, and what is reported on the way.

    Attributes:
      seed: of everything.
      scenes: captioned scenes drawn for the flow; seen several times, each time with other noise.
      autoencoder_scenes: scenes drawn for the autoencoder.
      workers: processes that draw.
      log_every: steps between two lines of the log.
      score_every: steps between two scores of a few held-out prompts (0: never).
      autoencoder, flow: how each is trained.
    """

    seed: int = 0
    scenes: int = 1_500_000
    autoencoder_scenes: int = 65_536
    workers: int = max(1, (os.cpu_count() or 2) - 2)
    log_every: int = 100
    score_every: int = 6000
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    flow: FlowTraining = FlowTraining()

    @classmethod
    def smoke(cls) -> Run:
        """A few steps of everything."""
        return cls(
            scenes=8192,
            autoencoder_scenes=8192,
            workers=1,
            log_every=2,
            score_every=0,
            autoencoder=AutoencoderTraining(steps=4, batch_size=4),
            flow=FlowTraining(steps=4, guidance_steps=2, batch_size=8, warmup=1),
        )


def component_configs() -> tuple[T5Config, CLIPTextConfig, FluxConfig]:
    """The tiny model's, with the vocabularies of the tokenizers."""
    t5, clip = rust_tokenizers()
    return (
        dataclasses.replace(T5Config.tiny(), vocab_size=t5.get_vocab_size()),
        dataclasses.replace(
            CLIPTextConfig.tiny(),
            vocab_size=clip.get_vocab_size(),
            eos_token_id=clip.token_to_id(CLIP_END),
        ),
        FluxConfig.tiny(),
    )


def train_autoencoder(
    run: Run, mesh: Mesh, log: Log, out: Path, init: Path | None
) -> AutoencoderTrainer:
    """The autoencoder, in float32; from `init` as it is, where given."""
    scenes = make_training_data(run.autoencoder_scenes, run.seed + 1, run.workers).scenes
    trainer = AutoencoderTrainer(run.autoencoder, scenes, mesh, seed=run.seed)
    if init is not None:
        weights = load_file(init / "autoencoder.safetensors")
        trainer.params = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    for step in range(1, 0 if init is not None else run.autoencoder.steps + 1):
        loss, squared = trainer.step(step)
        if step % (5 * run.log_every) == 0 or step == run.autoencoder.steps:
            log("autoencoder", step, float(loss), f"{psnr(float(squared)):.2f} dB")
    save_file(
        {k: np.asarray(v) for k, v in trainer.params.items()}, out / "autoencoder.safetensors"
    )
    return trainer


def encode_scenes(
    trainer: AutoencoderTrainer, scenes: SceneArrays, mesh: Mesh, batch: int
) -> tuple[jax.Array, AutoencoderConfig]:
    """All scenes as bf16 image tokens, of about zero mean and unit variance.

    Shift and scale are measured on the first `batch` scenes and serve for all.

    Returns:
      tokens (N, I, P), and the autoencoder's config with the shift and scale that did it.
    """

    def encode(params: Flat, part: SceneArrays) -> jax.Array:
        model = trainer.rebuild({k: v.astype(jnp.bfloat16) for k, v in params.items()})
        mean, _ = model.moments(render(part).astype(jnp.bfloat16))
        return pack(mean).astype(jnp.float32)

    rows = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    encode = jax.jit(encode, in_shardings=(replicated, rows), out_shardings=replicated)
    total = len(scenes.background) // batch * batch

    @jax.jit
    def measure(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.mean(tokens), jnp.std(tokens)

    def part(start: int) -> SceneArrays:
        return SceneArrays(*(np.asarray(f[start : start + batch]) for f in scenes))

    shift, std = (float(x) for x in measure(encode(trainer.params, part(0))))

    @functools.partial(jax.jit, donate_argnums=0)
    def store(everything: jax.Array, tokens: jax.Array, row: jax.Array) -> jax.Array:
        scaled = ((tokens - shift) / std).astype(jnp.bfloat16)
        return jax.lax.dynamic_update_slice(everything, scaled, (row, 0, 0))

    width = encode(trainer.params, part(0)).shape[1:]
    everything = jax.device_put(jnp.zeros((total, *width), jnp.bfloat16), replicated)
    for row in range(0, total, batch):
        everything = store(everything, encode(trainer.params, part(row)), jnp.int32(row))
    config = dataclasses.replace(
        AutoencoderConfig.tiny(), shift_factor=round(shift, 6), scaling_factor=round(1 / std, 6)
    )
    return everything, config


def evaluate(
    sampler: Sampler, params: Flat, autoencoder: Flat, *, limit: int | None, guidance: float
) -> tuple[dict[str, Any], np.ndarray]:
    """Composition score of the weights on (evenly chosen) held-out prompts, and the pictures."""
    from flux_jax.composition.score import score_images

    prompts = load_prompts()
    if limit is not None:
        prompts = prompts[:: max(1, len(prompts) // limit)]
    t5_ids, clip_ids = encode_captions([prompt.prompt for prompt in prompts])
    pictures = sampler(params, autoencoder, t5_ids, clip_ids, guidance=guidance, seed=0)
    return score_images(list(pictures), prompts).to_dict(), pictures


def prepare(
    run: Run, mesh: Mesh, log: Log, out: Path, init: Path | None
) -> tuple[FlowTrainer, AutoencoderTrainer, AutoencoderConfig, Captioned]:
    """Everything before the flow: its compiled steps, the autoencoder and the encoded scenes."""
    replicated = NamedSharding(mesh, PartitionSpec())
    trainer = FlowTrainer(run.flow, component_configs(), mesh, seed=run.seed)
    count = -(-run.scenes // CHUNK) * CHUNK
    # While the autoencoder trains, captions are drawn and the flow's steps are compiled.
    with ThreadPoolExecutor(2) as pool:
        drawing = pool.submit(make_training_data, count, run.seed, run.workers)
        compiling = pool.submit(trainer.compile, count)
        autoencoder = train_autoencoder(run, mesh, log, out, init)
        data: TrainingData = drawing.result()
        log("data", len(data), 0.0, "captioned scenes drawn")
        compiling.result()
    log("compiled", 0, 0.0)
    latents, config = encode_scenes(autoencoder, data.scenes, mesh, min(1024, len(data)))
    (out / "autoencoder.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    log("latents", len(latents), 0.0, f"shift {config.shift_factor} scale {config.scaling_factor}")
    empty_t5, empty_clip = encode_captions([""])
    captions = (data.t5_ids, data.clip_ids, empty_t5[0], empty_clip[0])
    captioned = Captioned(latents, *(jax.device_put(ids, replicated) for ids in captions))
    if init is not None:
        start = {k: jnp.asarray(v, jnp.float32) for k, v in load_parts(init, "flow").items()}
        trainer.params = jax.device_put(start, replicated)
        trainer.ema = jax.tree.map(jnp.copy, trainer.params)
    return trainer, autoencoder, config, captioned


def steps_that_fit(run: Run, log: Log, minutes: float, step_seconds: float, done: int) -> int:
    """Steps of the first phase for a run of `minutes`, leaving time for the second and the scores.

    A step of the second phase has two more forward passes: 1.6 times as long, as measured.
    """
    rest = 60 * minutes - (time.time() - log.start) - 1.6 * step_seconds * run.flow.guidance_steps
    return done + max(0, int((rest - 40.0) / step_seconds))


def train(
    run: Run, out: Path, init: Path | None = None, minutes: float | None = None
) -> dict[str, Any]:
    """All phases; writes weights, log, sample grids and scores into `out`.

    Args:
      run: the settings.
      out: folder; made if absent.
      init: an earlier run's folder, whose weights are the start.
      minutes: end after about this time: the steps of the first phase are what fits.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(dataclasses.asdict(run), indent=2) + "\n")
    log = Log(out / "log.csv")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    trainer, autoencoder, config, data = prepare(run, mesh, log, out, init)
    sampler = Sampler(trainer, _normalised(autoencoder, config), config)
    settings, loss = run.flow, jnp.float32(0)

    def report(phase: str, step: int, guidance: float, limit: int | None = 96) -> dict[str, Any]:
        scores, pictures = evaluate(
            sampler, trainer.ema, autoencoder.params, limit=limit, guidance=guidance
        )
        name = f"samples_{phase}_{step}_{guidance}.png"
        save_grid(out / name, pictures[:: max(1, len(pictures) // 64)])
        shares = {name: round(s["passed"], 3) for name, s in scores["categories"].items()}
        overall = scores["overall"]["passed"]
        log(phase, step, float(loss), f"score {overall:.3f} at guidance {guidance}: {shares}")
        return scores

    step, total, started = 0, settings.steps, time.time()
    while step < total:
        step += 1
        rate = trapezoid(settings.learning_rate, step, total, settings.warmup, settings.decay)
        loss = trainer.step(data, step, rate)
        if step % run.log_every == 0:
            log("flow", step, float(loss), f"rate {rate:.2e}")
        if step == run.log_every:
            started = time.time()
        if minutes is not None and step == 3 * run.log_every:
            each = (time.time() - started) / (2 * run.log_every)
            total = steps_that_fit(run, log, minutes, each, step)
            log("flow", step, float(loss), f"{1e3 * each:.1f} ms a step, {total} steps fit")
        if run.score_every and step % run.score_every == 0:
            save_parts(out, "flow", trainer.ema)
            report("flow", step, 1.0)
    save_parts(out, "flow", trainer.ema)

    trainer.start_guidance()
    for step in range(1, settings.guidance_steps + 1):
        peak, decay = settings.guidance_learning_rate, settings.decay
        rate = trapezoid(peak, step, settings.guidance_steps, settings.warmup // 3, decay)
        loss = trainer.guidance_step(data, total + step, rate)
        if step % run.log_every == 0:
            log("guidance", step, float(loss))
    save_parts(out, "flow", trainer.ema)
    limit = 16 if run.score_every == 0 else None
    result: dict[str, Any] = {"steps": total}
    for guidance in (3.5, 1.0, 2.0, 5.0):
        result[f"guidance_{guidance}"] = report("final", total, guidance, limit)
        (out / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _normalised(trainer: AutoencoderTrainer, config: AutoencoderConfig) -> Any:
    def rebuild(params: Flat) -> Any:
        model = trainer.rebuild({k: v.astype(jnp.bfloat16) for k, v in params.items()})
        model.config = config
        return model

    return rebuild


def main(
    out: Annotated[Path, typer.Option(help="Folder for weights, log, samples and scores.")],
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this run.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the first phase.")] = FlowTraining.steps,
    guidance_steps: Annotated[
        int, typer.Option(help="Steps of the guidance distillation.")
    ] = FlowTraining.guidance_steps,
    batch_size: Annotated[int, typer.Option(help="Captions a step.")] = FlowTraining.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the first phase.")
    ] = FlowTraining.learning_rate,
    autoencoder_steps: Annotated[
        int, typer.Option(help="Steps of the autoencoder.")
    ] = AutoencoderTraining.steps,
    scenes: Annotated[int, typer.Option(help="Captioned scenes to draw.")] = Run.scenes,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="Fit the steps of the first phase into this time.")
    ] = None,
    smoke: Annotated[bool, typer.Option(help="A few steps of each phase.")] = False,
) -> None:
    """Train the tiny FLUX on drawn scenes."""
    run = Run(
        seed=seed,
        scenes=scenes,
        autoencoder=AutoencoderTraining(steps=autoencoder_steps),
        flow=FlowTraining(
            steps=steps,
            guidance_steps=guidance_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
        ),
    )
    with exit_on_user_error():
        train(Run.smoke() if smoke else run, out, init, minutes)


if __name__ == "__main__":
    typer.run(main)
