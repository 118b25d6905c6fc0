"""One part of `benchmarks.full_size`, in a process of its own: its peaks are its own.

Writes its figures as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import QUEUED_STEPS, device_figures
from flux_jax.configs import AutoencoderConfig, CLIPTextConfig, FluxConfig, T5Config
from flux_jax.tokenization import DEV_TOKENS

# What is drawn: the same transformer in three ways.
KINDS = ("bf16", "ternary A16", "ternary A8")


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

    bits = 8 if kind.endswith("A8") else 16
    layers = write_ternary_pipeline(work / "model", size.configs, activation_bits=bits)
    files = (work / "model" / "transformer").iterdir()
    shapes = dense_shapes(size.transformer)
    return {
        "bf16_bytes": 2 * paper.parameter_count(size.transformer),
        "ternary_bytes": sum(file.stat().st_size for file in files),
        "ternary_share": coverage(shapes, layers).fraction,
    }


def random_transformer(config: FluxConfig, kind: str) -> Any:
    """A transformer with random weights of a trained model's scale, drawn on the device."""
    import jax
    import jax.numpy as jnp

    from benchmarks.scaled_weights import moments, ternary_layers
    from flux_jax.components import abstract_module
    from flux_jax.tree import split_flat
    from ternary.config import QuantConfig
    from ternary.layers import TernaryLinear
    from ternary.policy import linears
    from ternary.storage.checkpoint import abstract_ternary

    layers: dict[str, Any] = {}
    if kind == "bf16":
        module = abstract_module("transformer", config)
    else:
        quant = QuantConfig(activation_bits=8 if kind.endswith("A8") else 16)
        module = abstract_ternary(config, ternary_layers(config), quant, jnp.bfloat16)
        layers = linears(module, TernaryLinear)

    @jax.jit
    def codes(bits: jax.Array) -> jax.Array:
        # Of two random bits the sum: 0, 1, 2 with 1, 2, 1 of 4.
        return (bits & 0x55) + ((bits >> 1) & 0x55)

    def draw(index: int, name: str, shape: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0, impl="rbg"), index)
        layer, _, last = name.rpartition(".")
        if layer in layers and last == "packed":
            return codes(jax.random.bits(key, shape.shape, jnp.uint8))
        if layer in layers and last == "scale":
            return jnp.full(shape.shape, (layers[layer].in_features / 2) ** -0.5, shape.dtype)
        mean, deviation = moments(name, shape.shape)
        return mean + deviation * jax.random.normal(key, shape.shape, shape.dtype)

    rebuild, flat = split_flat(module)
    values = {}
    for index, (name, shape) in enumerate(flat.items()):
        # One at a time: what drawing takes must not be the peak.
        values[name] = jax.block_until_ready(draw(index, name, shape))
    return rebuild(values)


def random_embeds(size: Size, batch: int) -> Any:
    """Encoded prompts, as the text encoders would give them."""
    import jax.numpy as jnp
    import numpy as np

    from flux_jax.prompts import PromptEmbeds

    config, random = size.transformer, np.random.default_rng(1)
    shapes = (batch, size.text_tokens, config.context_in_dim), (batch, config.vec_in_dim)
    states, pooled = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes)
    return PromptEmbeds(prompts=("",) * batch, prompt_embeds=states, pooled_prompt_embeds=pooled)


class Loop:
    """The pipeline's denoising loop on random inputs."""

    def __init__(self, size: Size, kind: str, *, offload: bool):
        from flux_jax.residence import HostWeights, modulation_layers

        self.size = size
        self.transformer = random_transformer(size.transformer, kind)
        layers = modulation_layers(self.transformer)
        self.waiting = HostWeights(layers) if offload else None

    def steps(self, side: int, batch: int) -> Iterator[Any]:
        """The latents after each step of one batch."""
        import numpy as np

        from flux_jax.configs import SchedulerConfig
        from flux_jax.denoise import denoise
        from flux_jax.scheduler import make_schedule

        config, grid = self.size.transformer, self.size.grid(side)
        shape = (batch, grid[0] * grid[1], config.in_channels)
        latents = np.random.default_rng(2).standard_normal(shape, np.float32)
        schedule = make_schedule(SchedulerConfig.dev(), self.size.steps, shape[1])
        arguments: Any = (
            self.transformer,
            schedule,
            latents,
            grid,
            random_embeds(self.size, batch),
        )
        for upcoming, _ in denoise(*arguments, guidance_scale=3.5, waiting=self.waiting):
            yield upcoming

    def time(self, side: int, batch: int, loops: int) -> dict[str, Any]:
        """Seconds of a step: the median over groups of queued steps; and of the first one."""
        import jax
        import numpy as np

        start = time.perf_counter()
        jax.block_until_ready(next(self.steps(side, batch)))
        first, groups = time.perf_counter() - start, []
        latents = None
        for _ in range(loops):
            steps = self.steps(side, batch)
            jax.block_until_ready(next(steps))
            for _ in range((self.size.steps - 1) // QUEUED_STEPS):
                start = time.perf_counter()
                for _ in range(QUEUED_STEPS):
                    latents = next(steps)
                jax.block_until_ready(latents)
                groups.append((time.perf_counter() - start) / QUEUED_STEPS)
        if not np.isfinite(np.asarray(latents)).all():
            raise RuntimeError("the latents are not finite: the step's time would mean nothing")
        return {"step_s": statistics.median(groups), "first_s": first, "groups": len(groups)}

    def planned_bytes(self, side: int, batch: int) -> int:
        """What the loop holds at most: weights, inputs, and the step's work as XLA plans it."""
        import jax
        import jax.numpy as jnp

        from flux_jax.denoise import CHUNK, MODULATIONS, VELOCITY

        config, (rows, columns) = self.size.transformer, self.size.grid(side)
        embeds, shape = random_embeds(self.size, batch), jax.ShapeDtypeStruct
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
    import jax

    try:
        loop = Loop(size, kind, offload=offload)
        timed = loop.time(size.side, 1, size.loops)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**device_figures(), "out_of_memory": True}
    print(f"  {kind}: {1e3 * timed['step_s']:.2f} ms a step", flush=True)
    planned = loop.planned_bytes(size.side, 1)
    return {**device_figures(), "out_of_memory": False, **timed, "planned_bytes": planned}


def run_offloaded(size: Size, work: Path, kind: str) -> dict[str, Any]:
    """As `run_loop`, with the modulation's weights on the host while the loop runs."""
    return run_loop(size, work, kind, offload=True)


def run_scaling(size: Size, work: Path, kind: str) -> dict[str, Any]:
    """Time and memory by picture size and by batch."""
    import jax

    loop = Loop(size, kind, offload=False)
    found = {}
    shapes = [(side, 1) for side in size.sides] + [(size.side, batch) for batch in size.batches]
    for side, batch in shapes:
        start = time.perf_counter()
        try:
            timed = loop.time(side, batch, 1)
            found[f"{side}x{batch}"] = {
                "side": side,
                "batch": batch,
                "step_s": timed["step_s"],
                "planned_bytes": loop.planned_bytes(side, batch),
            }
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        took = time.perf_counter() - start
        print(f"  {kind}, {side} pixels, batch {batch}: {took:.0f} s in all", flush=True)
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
    if kind not in KINDS or stage not in STAGES or size not in SIZES:
        raise SystemExit(f"error: no such stage, kind or size: {stage}, {kind}, {size}")
    chosen = SIZES[size] if loops is None else dataclasses.replace(SIZES[size], loops=loops)
    output.write_text(json.dumps(STAGES[stage](chosen, work, kind)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
