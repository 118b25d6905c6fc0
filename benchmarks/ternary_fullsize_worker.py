"""One stage of `benchmarks.ternary_fullsize`, in a process of its own: its peaks are its own.

Writes its figures as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import paper
from benchmarks.common import run
from benchmarks.machine import device_figures
from flux_jax.configs import FluxConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      config: of the transformer.
      grid: image tokens (rows, columns).
      text_tokens: of T5.
      blocks: those that are calibrated, one of each kind; none for a checkpoint that is rounded.
      samples, batch_size, steps: of the calibration.
      timed: denoising steps after the first, which compiles.
    """

    config: FluxConfig
    grid: tuple[int, int]
    text_tokens: int
    blocks: tuple[str, ...] = ("double_blocks.0", "single_blocks.0")
    samples: int = 8
    batch_size: int = 4
    steps: int = 8
    timed: int = 4


SIZES = {
    "full": Size(config=FluxConfig.dev(), grid=(64, 64), text_tokens=512),
    # Calibration keeps the teacher in host memory, all of its 24 GB.
    "cpu": Size(config=FluxConfig.dev(), grid=(16, 16), text_tokens=512, blocks=(), timed=2),
    "tiny": Size(
        config=dataclasses.replace(FluxConfig.tiny(), depth=1, depth_single_blocks=1),
        grid=(4, 4),
        text_tokens=16,
        samples=4,
        batch_size=2,
        steps=4,
    ),
}


def make_source(size: Size, work: Path) -> dict[str, Any]:
    """The teacher: random bf16 weights in diffusers' layout."""
    from benchmarks.scaled_weights import write_pipeline

    return {"source_bytes": write_pipeline(work / "teacher", size.config)}


def random_prompts(size: Size, count: int) -> Any:
    """Embeddings as text encoders would give them; there are none here."""
    import jax.numpy as jnp
    import numpy as np

    from ternary.distillation.step import PromptSet

    random = np.random.default_rng(1)
    widths = size.config.context_in_dim, size.config.vec_in_dim
    shapes = (count, size.text_tokens, widths[0]), (count, widths[1])
    return PromptSet(*(jnp.asarray(random.standard_normal(s, np.float32)) for s in shapes))


def calibrate(size: Size, work: Path) -> dict[str, Any]:
    """Two blocks, the others rounded; writes a ternary checkpoint."""
    from ternary.calibration.calibrator import Listener
    from ternary.calibration.run import calibrate_checkpoint
    from ternary.config import CalibrateConfig, QuantConfig
    from ternary.policy import Policy

    start = time.perf_counter()
    moments: dict[str, float] = {}

    def note(what: str) -> None:
        moments[what] = time.perf_counter() - start
        print(f"  {what}: {moments[what]:.1f} s", flush=True)

    class Watch(Listener):
        def on_states(self, done: int, total: int) -> None:
            if done == 1:
                note("weights read, first part passed")
            if done == total:
                note("trajectories")

        def on_part(self, part: Any, report: Any) -> None:
            note(part.name)
            if part.name == size.blocks[-1]:
                note("calibrated")

    config = CalibrateConfig(
        samples=size.samples,
        states_each=2,
        sampling_steps=2,
        steps=size.steps,
        batch_size=size.batch_size,
        # One sample's activations at a time.
        accumulate=size.batch_size,
        learning_rate=5e-4,
        blocks=size.blocks,
    )
    result = calibrate_checkpoint(
        work / "teacher",
        work / "calibrated",
        random_prompts(size, size.samples // 2),
        QuantConfig(),
        Policy(),
        config,
        grid=size.grid,
        latents=False,
        listener=Watch(),
    )
    note("written")
    reports = {name: dataclasses.asdict(report) for name, report in result.reports.items()}
    return {
        **device_figures(),
        "moments": moments,
        "reports": reports,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "samples": config.samples,
    }


def load_transformer(work: Path) -> Any:
    """The calibrated transformer, once all of it is on the device."""
    import jax

    from flux_jax.checkpoint import load_checkpoint
    from flux_jax.tree import to_flat

    calibrated = work / "calibrated"
    source = calibrated if calibrated.exists() else work / "rounded"
    loaded = load_checkpoint(source, components=["transformer"])
    transformer = loaded.modules["transformer"]
    jax.block_until_ready(list(to_flat(transformer).values()))
    return transformer


def load(size: Size, work: Path) -> dict[str, Any]:
    """The ternary checkpoint onto the device."""
    import jax
    import jax.numpy as jnp

    from flux_jax.linears import linears
    from ternary.layers import TernaryLinear

    del size
    # What starting the backend takes is not the checkpoint's.
    jax.block_until_ready(jnp.zeros(1))
    start = time.perf_counter()
    transformer = load_transformer(work)
    seconds = time.perf_counter() - start
    in_use = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    config = transformer.config
    layers = linears(transformer, TernaryLinear).values()
    ternary = sum(layer.packed.shape[0] * layer.in_features for layer in layers)
    return {
        **device_figures(),
        "seconds": seconds,
        "device_bytes": in_use,
        "ternary_fraction": ternary / paper.parameter_count(config),
    }


def step(size: Size, work: Path) -> dict[str, Any]:
    """Denoising steps with the ternary checkpoint, as the pipeline takes them."""
    import jax
    import numpy as np

    from flux_jax.configs import SchedulerConfig
    from flux_jax.denoise import denoise
    from flux_jax.prompt_embeds import PromptEmbeds
    from flux_jax.scheduler import make_schedule

    transformer = load_transformer(work)
    tokens = size.grid[0] * size.grid[1]
    noise = np.random.default_rng(2).standard_normal((1, tokens, size.config.in_channels))
    prompts = random_prompts(size, 1)
    embeds = PromptEmbeds(
        prompts=("",), prompt_embeds=prompts.txt, pooled_prompt_embeds=prompts.pooled
    )
    schedule = make_schedule(SchedulerConfig.dev(), 28, tokens)
    latents = noise.astype(np.float32)
    arguments: Any = (transformer, schedule, latents, size.grid, embeds)
    steps = denoise(*arguments, guidance_scale=3.5)
    seconds = []
    for _ in range(1 + size.timed):
        start = time.perf_counter()
        drawn = jax.block_until_ready(next(steps))
        seconds.append(time.perf_counter() - start)
        print(f"  step: {seconds[-1]:.3f} s", flush=True)
    if not np.isfinite(np.asarray(drawn[0])).all():
        raise RuntimeError("the latents are not finite: the step's time would mean nothing")
    return {
        **device_figures(),
        "first_s": seconds[0],
        "step_s": statistics.median(seconds[1:]),
    }


STAGES: dict[str, Callable[[Size, Path], dict[str, Any]]] = {
    "source": make_source,
    "calibrate": calibrate,
    "load": load,
    "step": step,
}


def main(
    stage: Annotated[str, typer.Argument(help="source, calibrate, load or step.")],
    work: Annotated[Path, typer.Option(help="Where the checkpoints are.")],
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    size: Annotated[str, typer.Option(help="full, cpu or tiny.")] = "full",
) -> None:
    """Runs one stage."""
    output.write_text(json.dumps(STAGES[stage](SIZES[size], work)), encoding="utf-8")


if __name__ == "__main__":
    run(main)
