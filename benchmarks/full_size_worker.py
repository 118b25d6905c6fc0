"""One part of `benchmarks.full_size`, in a process of its own: its peaks are its own.

Writes its figures as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import QUEUED_STEPS, run
from benchmarks.machine import device_figures
from benchmarks.processes import folder_bytes
from flux_jax.configs import AutoencoderConfig, CLIPTextConfig, FluxConfig, T5Config
from flux_jax.errors import UserError
from flux_jax.tokenization import DEV_TOKENS

# The same transformer in three ways: bits of the activations of its ternary linears, None if dense.
KINDS = {"bf16": None, "ternary A16": 16, "ternary A8": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      configs: of the four components.
      side: pixels of the picture.
      steps: of a picture.
      loops: pictures whose steps are timed.
      sides: pixels of square pictures drawn one by one, for how time and memory grow.
      batches: pictures of `side` pixels drawn together, for the same.
      text_tokens: of T5.
    """

    configs: dict[str, Any]
    side: int = 1024
    steps: int = 28
    loops: int = 4
    sides: tuple[int, ...] = (512, 768, 1024, 1536, 2048)
    batches: tuple[int, ...] = (2, 4, 8)
    text_tokens: int = DEV_TOKENS

    @property
    def transformer(self) -> FluxConfig:
        return self.configs["transformer"]

    def grid(self, side: int) -> tuple[int, int]:
        """Image tokens (rows, columns) of a square picture."""
        tokens = side // (2 * self.configs["vae"].downscale)
        return tokens, tokens


SIZES = {
    "full": Size(
        configs={
            "transformer": FluxConfig.dev(),
            "text_encoder": CLIPTextConfig.large(),
            "text_encoder_2": T5Config.xxl(),
            "vae": AutoencoderConfig.flux(),
        }
    ),
    "tiny": Size(
        configs={
            "transformer": dataclasses.replace(FluxConfig.tiny(), depth=1, depth_single_blocks=1),
            # The shipped tokenizer has more words than the preset.
            "text_encoder": dataclasses.replace(CLIPTextConfig.tiny(), vocab_size=1024),
            "text_encoder_2": T5Config.tiny(),
            "vae": AutoencoderConfig.tiny(),
        },
        side=64,
        steps=6,
        loops=1,
        sides=(32, 64),
        batches=(2,),
        text_tokens=16,
    ),
}


def make_source(size: Size, work: Path, kind: str) -> dict[str, Any]:
    """The whole pipeline on disk, its transformer ternary."""
    from benchmarks import paper
    from benchmarks.scaled_weights import write_ternary_pipeline
    from ternary.policy import coverage
    from ternary.storage.checkpoint import dense_shapes

    bits = KINDS[kind]
    if bits is None:
        raise UserError(f"the pipeline on disk is ternary, got --kind {kind}")
    layers = write_ternary_pipeline(work / "model", size.configs, activation_bits=bits)
    shapes = dense_shapes(size.transformer)
    return {
        "bf16_bytes": 2 * paper.parameter_count(size.transformer),
        "ternary_bytes": folder_bytes(work / "model" / "transformer"),
        "ternary_share": coverage(shapes, layers).fraction,
    }


class Loop:
    """The pipeline's denoising loop on random inputs."""

    def __init__(self, size: Size, kind: str, *, offload: bool):
        from benchmarks.random_models import random_transformer
        from flux_jax.kernels import use_kernels
        from flux_jax.residence import HostWeights, modulation_layers

        self.size = size
        self.transformer = random_transformer(size.transformer, activation_bits=KINDS[kind])
        use_kernels(self.transformer)
        layers = modulation_layers(self.transformer)
        self.waiting = HostWeights(layers) if offload else None

    def steps(self, side: int, batch: int) -> Iterator[Any]:
        """The latents after each step of one batch."""
        import numpy as np

        from benchmarks.random_models import random_embeds
        from flux_jax.configs import SchedulerConfig
        from flux_jax.denoise import denoise
        from flux_jax.scheduler import make_schedule

        config, grid = self.size.transformer, self.size.grid(side)
        shape = (batch, grid[0] * grid[1], config.in_channels)
        latents = np.random.default_rng(2).standard_normal(shape, np.float32)
        schedule = make_schedule(SchedulerConfig.dev(), self.size.steps, shape[1])
        embeds = random_embeds(config, batch, self.size.text_tokens)
        arguments: Any = (self.transformer, schedule, latents, grid, embeds)
        for upcoming, _ in denoise(*arguments, guidance_scale=3.5, waiting=self.waiting):
            yield upcoming

    def time(self, side: int, batch: int, loops: int, groups: int | None = None) -> dict[str, Any]:
        """Seconds of a step: the median over groups of queued steps; and of the first one.

        Args:
          side: pixels of a picture.
          batch: pictures drawn together.
          loops: how many are drawn.
          groups: of each, at most; all of its steps by default.
        """
        import jax
        import numpy as np

        start = time.perf_counter()
        jax.block_until_ready(next(self.steps(side, batch)))
        first, taken = time.perf_counter() - start, []
        whole = (self.size.steps - 1) // QUEUED_STEPS
        latents = None
        for _ in range(loops):
            steps = self.steps(side, batch)
            jax.block_until_ready(next(steps))
            for _ in range(whole if groups is None else min(groups, whole)):
                start = time.perf_counter()
                for _ in range(QUEUED_STEPS):
                    latents = next(steps)
                jax.block_until_ready(latents)
                taken.append((time.perf_counter() - start) / QUEUED_STEPS)
        if not np.isfinite(np.asarray(latents)).all():
            raise RuntimeError("the latents are not finite: the step's time would mean nothing")
        return {"step_s": statistics.median(taken), "first_s": first, "groups": len(taken)}

    def planned_bytes(self, side: int, batch: int) -> int:
        """What the loop holds at most: weights, inputs, and the step's work as XLA plans it."""
        import jax
        import jax.numpy as jnp

        from benchmarks.random_models import random_embeds
        from flux_jax.denoise import CHUNK, MODULATIONS, VELOCITY

        config, (rows, columns) = self.size.transformer, self.size.grid(side)
        embeds = random_embeds(config, batch, self.size.text_tokens)
        shape = jax.ShapeDtypeStruct
        scheduled = MODULATIONS.bind(self.transformer)
        times = shape((CHUNK,), jnp.float32), embeds.pooled_prompt_embeds
        mods = jax.eval_shape(scheduled.program, scheduled.leaves, (*times, shape((), jnp.float32)))
        inputs = (
            shape((batch, rows * columns, config.in_channels), jnp.float32),
            shape((rows * columns, 3), jnp.int32),
            embeds.prompt_embeds,
            shape((self.size.text_tokens, 3), jnp.int32),
            shape(mods.shape[1:], mods.dtype),
        )
        velocity = VELOCITY.bind(self.transformer)
        weights = [leaf for leaf in velocity.leaves if isinstance(leaf, jax.Array)]
        chunks = math.ceil(self.size.steps / CHUNK)
        arrays = [*weights, *inputs, *[mods] * chunks]
        held = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        return held + velocity.work_bytes(*inputs)


def run_loop(size: Size, work: Path, kind: str, *, offload: bool = False) -> dict[str, Any]:
    """Steps at the main size; out of memory is a result, too."""
    loop = timed = None
    with unless_out_of_memory():
        loop = Loop(size, kind, offload=offload)
        timed = loop.time(size.side, 1, size.loops)
    if loop is None or timed is None:
        return {**device_figures(), "out_of_memory": True}
    print(f"  {kind}: {1e3 * timed['step_s']:.2f} ms a step", flush=True)
    planned = loop.planned_bytes(size.side, 1)
    return {**device_figures(), "out_of_memory": False, **timed, "planned_bytes": planned}


@contextlib.contextmanager
def unless_out_of_memory() -> Iterator[None]:
    """The block, as far as the device's memory suffices: running out of it ends the block alone."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise


def run_offloaded(size: Size, work: Path, kind: str) -> dict[str, Any]:
    """As `run_loop`, with the modulation's weights on the host while the loop runs."""
    return run_loop(size, work, kind, offload=True)


def run_scaling(size: Size, work: Path, kind: str) -> dict[str, Any]:
    """Time and memory by picture size and by batch."""
    loop = Loop(size, kind, offload=False)
    shapes = [(side, 1) for side in size.sides] + [(size.side, batch) for batch in size.batches]

    def plan(shape: tuple[int, int]) -> int | None:
        with unless_out_of_memory():
            return loop.planned_bytes(*shape)

    # Compiled side by side, before anything is timed.
    with ThreadPoolExecutor(len(shapes)) as pool:
        planned = dict(zip(shapes, pool.map(plan, shapes), strict=True))
    found = {}
    for (side, batch), planned_bytes in planned.items():
        if planned_bytes is None:
            continue
        start = time.perf_counter()
        with unless_out_of_memory():
            # A large picture's step takes a second: some of them tell enough.
            timed = loop.time(side, batch, 1, groups=2)
            figures = {"step_s": timed["step_s"], "planned_bytes": planned_bytes}
            found[f"{side}x{batch}"] = {"side": side, "batch": batch, **figures}
        took = time.perf_counter() - start
        print(f"  {kind}, {side} pixels, batch {batch}: {took:.0f} s", flush=True)
    return {**device_figures(), "shapes": found}


def run_floor(size: Size, work: Path, kind: str) -> dict[str, Any]:
    """The products at the int8 rate and the attention, each timed alone."""
    from benchmarks import floors
    from benchmarks.paper import Step

    rows, columns = size.grid(size.side)
    step = Step(image_tokens=rows * columns, text_tokens=size.text_tokens)
    found = floors.measure(size.transformer, step, int8=kind != "bf16")
    return {**device_figures(), "floors_ms": found}


STAGES: dict[str, Callable[[Size, Path, str], dict[str, Any]]] = {
    "source": make_source,
    "loop": run_loop,
    "offloaded": run_offloaded,
    "scaling": run_scaling,
    "floor": run_floor,
}


def main(
    stage: Annotated[str, typer.Argument(help=", ".join(STAGES))],
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    work: Annotated[Path, typer.Option(help="Where the checkpoint is.")] = Path("."),
    kind: Annotated[str, typer.Option(help=", ".join(KINDS))] = "ternary A8",
    size: Annotated[str, typer.Option(help="full or tiny.")] = "full",
    loops: Annotated[int | None, typer.Option(help="Pictures whose steps are timed.")] = None,
) -> None:
    """Runs one stage."""
    for value, known in ((stage, STAGES), (kind, KINDS), (size, SIZES)):
        if value not in known:
            raise UserError(f"expected one of {', '.join(known)}, got {value}")
    chosen = SIZES[size] if loops is None else dataclasses.replace(SIZES[size], loops=loops)
    output.write_text(json.dumps(STAGES[stage](chosen, work, kind)), encoding="utf-8")


if __name__ == "__main__":
    run(main)
