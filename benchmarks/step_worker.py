"""One process of `benchmarks.transformer_step`: compiles one variant of the step, and times it.

A process of its own, because the cold compile must find no cache and the peak memory must not
count what the autotuner of an earlier compile had allocated. Writes its figures as JSON.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

from benchmarks import floors, trace_table
from benchmarks.common import QUEUED_STEPS, median_seconds, run
from benchmarks.machine import device_figures
from benchmarks.paper import SIZES, Step
from benchmarks.random_models import random_transformer
from flux_jax.configs import FluxConfig
from flux_jax.kernels import use_kernels
from flux_jax.rope import image_ids, rotary_angles, text_ids
from flux_jax.transformer import DoubleStreamBlock, SingleStreamBlock

INPUT_SETS = 4

Inputs = tuple[Any, ...]
# What a variant gives: the function to time, its argument sets, and the program's text if one.
Prepared = tuple[Callable[..., Any], list[Inputs], str]


def random_weights(
    config: FluxConfig,
    variant: str = "whole",
    kernels: str | None = None,
    attention: str | None = None,
) -> tuple[Any, Any]:
    """(graphdef, state) of a transformer with random weights.

    Args:
      config: its size.
      variant: one of `TERNARY` for packed weights.
      kernels: of those, as in `flux_jax.kernels.use_kernels`.
      attention: of all variants, likewise.

    Raises:
      UserError: the kernels cannot run here.
    """
    model = random_transformer(config, activation_bits=TERNARY.get(variant))
    use_kernels(model, kernels=kernels if variant in TERNARY else None, attention_by=attention)
    return nnx.split(model)


def random_inputs(config: FluxConfig, step: Step) -> list[Inputs]:
    """`INPUT_SETS` argument tuples of the transformer."""
    side = math.isqrt(step.image_tokens)
    ids = jnp.asarray(image_ids(side, step.image_tokens // side))
    texts = jnp.asarray(text_ids(step.text_tokens))
    sets = []
    for index in range(INPUT_SETS):
        keys = jax.random.split(jax.random.key(100 + index), 3)
        shapes = (
            (step.batch, step.image_tokens, config.in_channels),
            (step.batch, step.text_tokens, config.context_in_dim),
            (step.batch, config.vec_in_dim),
        )
        img, txt, y = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )
        time_ = jnp.full((step.batch,), 1.0 - index / INPUT_SETS, jnp.float32)
        guidance = jnp.full((step.batch,), 3.5, jnp.float32) if config.guidance_embed else None
        sets.append((img, ids, txt, texts, time_, y, guidance))
    return sets


def _split_flat(graphdef: Any, state: Any) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """The arrays of a module, and what makes it of them again.

    A call walks its arguments: 780 parameters in a plain list take microseconds, in nnx's own
    containers milliseconds. The pipeline does the same.
    """
    leaves, structure = jax.tree.flatten(state)
    return lambda leaves: nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)), leaves


def prepare_whole(graphdef: Any, state: Any, sets: list[Inputs]) -> Prepared:
    """The step as one program."""
    model, leaves = _split_flat(graphdef, state)

    def step(leaves: list[Any], inputs: Inputs) -> jax.Array:
        return model(leaves)(*inputs)

    compiled = jax.jit(step).lower(leaves, sets[0]).compile()
    return compiled, [(leaves, inputs) for inputs in sets], compiled.as_text() or ""


def prepare_hoisted(graphdef: Any, state: Any, sets: list[Inputs]) -> Prepared:
    """The step as one program that is given the modulation vectors, computed beforehand."""

    model, leaves = _split_flat(graphdef, state)

    @jax.jit
    def modulate(leaves: list[Any], inputs: Inputs) -> Any:
        transformer = model(leaves)
        return transformer.modulations(transformer.conditioning(*inputs[4:]))

    def step(leaves: list[Any], inputs: Inputs, mods: Any) -> jax.Array:
        return model(leaves).velocity(*inputs[:4], mods)

    arguments = [(leaves, inputs, modulate(leaves, inputs)) for inputs in sets]
    compiled = jax.jit(step).lower(*arguments[0]).compile()
    return compiled, arguments, compiled.as_text() or ""


def prepare_blocks(graphdef: Any, state: Any, sets: list[Inputs]) -> Prepared:
    """One program per kind of block, called once for each block, and one for either end."""
    model = nnx.merge(graphdef, state)
    config = model.config
    doubles = [_split_flat(*nnx.split(block)) for block in model.double_blocks]
    singles = [_split_flat(*nnx.split(block)) for block in model.single_blocks]
    model.double_blocks, model.single_blocks = nnx.List([]), nnx.List([])
    ends, ends_leaves = _split_flat(*nnx.split(model))

    @jax.jit
    def start(leaves: list[Any], inputs: Inputs) -> Any:
        model = ends(leaves)
        img, ids, txt, texts, *rest = inputs
        positions = jnp.concatenate((texts, ids), axis=0)
        rotation = rotary_angles(positions, config.axes_dim, config.theta)
        return model.img_in(img), model.txt_in(txt), model.conditioning(*rest), rotation

    @jax.jit
    def double(leaves: list[Any], img: Any, txt: Any, vec: Any, rotation: Any) -> Any:
        block: DoubleStreamBlock = doubles[0][0](leaves)
        return block(img, txt, (block.img_mod(vec), block.txt_mod(vec)), rotation)

    @jax.jit
    def single(leaves: list[Any], x: Any, vec: Any, rotation: Any) -> Any:
        block: SingleStreamBlock = singles[0][0](leaves)
        return block(x, block.modulation(vec), rotation)

    @functools.partial(jax.jit, static_argnums=3)
    def end(leaves: list[Any], x: Any, vec: Any, text_tokens: int) -> Any:
        last = ends(leaves).final_layer
        return last(x[:, text_tokens:], last.modulation(vec))

    def step(inputs: Inputs) -> jax.Array:
        img, txt, vec, rotation = start(ends_leaves, inputs)
        for _, leaves in doubles:
            img, txt = double(leaves, img, txt, vec, rotation)
        x = jnp.concatenate((txt, img), axis=1)
        for _, leaves in singles:
            x = single(leaves, x, vec, rotation)
        return end(ends_leaves, x, vec, txt.shape[1])

    jax.block_until_ready(step(sets[0]))
    return step, [(inputs,) for inputs in sets], ""


# With packed weights; the activations' bits.
TERNARY = {"ternary-a8": 8, "ternary-a16": 16}
VARIANTS: dict[str, Callable[[Any, Any, list[Inputs]], Prepared]] = {
    "whole": prepare_whole,
    "hoisted": prepare_hoisted,
    "blocks": prepare_blocks,
    # As the pipeline runs it.
    **dict.fromkeys(TERNARY, prepare_hoisted),
}


def check_outputs(step: Callable[..., Any], arguments: list[Inputs]) -> None:
    """Raises RuntimeError unless the step is finite, depends on its input and repeats itself."""
    first, again, other = (
        np.asarray(step(*given), np.float32) for given in (arguments[0], arguments[0], arguments[1])
    )
    if not np.isfinite(first).all():
        raise RuntimeError("the step's output is not finite: its time would mean nothing")
    if not np.array_equal(first, again) or np.array_equal(first, other):
        raise RuntimeError("the step's output does not repeat, or does not depend on its input")


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    size: Annotated[str, typer.Option(help="full or tiny.")] = "full",
    variant: Annotated[str, typer.Option(help=f"One of {', '.join(VARIANTS)}.")] = "whole",
    kernels: Annotated[
        str | None,
        typer.Option(help="Of packed weights: mosaic, triton or jax; by itself if none."),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="An implementation of flux_jax.attention.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps; 0 only compiles.")] = 20,
    floor: Annotated[bool, typer.Option(help="Time the step's products alone too.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Write a trace here; print it.")] = None,
) -> None:
    """Compiles one variant of the transformer step and times it."""
    config, step_size = SIZES[size]
    graphdef, state = random_weights(config, variant, kernels, attention)
    sets = random_inputs(config, step_size)
    jax.block_until_ready((state, sets))
    start = time.perf_counter()
    step, arguments, text = VARIANTS[variant](graphdef, state, sets)
    figures: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    print(f"  {variant}: compiled in {figures['compile_s']:.1f} s", flush=True)
    if repeats:
        # Waited for first: a card that comes out of a long queue is still at its power limit.
        for name, calls in (("waited_ms", 1), ("step_ms", QUEUED_STEPS)):
            seconds = median_seconds(
                step, arguments, wait=jax.block_until_ready, repeats=repeats, calls=calls
            )
            figures[name] = 1e3 * seconds
        # Before anything else takes memory.
        figures |= device_figures()
        check_outputs(step, arguments)
        times = f"{figures['step_ms']:.2f} ms a step, {figures['waited_ms']:.2f} waited for"
        print(f"  {variant}: {times}", flush=True)
    if profile is not None:
        _profile(step, arguments, text, profile)
    if floor:
        del state, arguments, step, sets
        figures["floors_ms"] = floors.measure(config, step_size)
    output.write_text(json.dumps({**device_figures(), **figures}), encoding="utf-8")


def _profile(step: Callable[..., Any], arguments: list[Inputs], text: str, folder: Path) -> None:
    """Traces one step per input set; leaves the program's text and the table beside the trace."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.block_until_ready(step(*arguments[0]))
    with jax.profiler.trace(str(folder)):
        for given in arguments:
            jax.block_until_ready(step(*given))
    if text:
        (folder / "step.hlo.txt.gz").write_bytes(gzip.compress(text.encode()))
    table = trace_table.read_trace(folder, trace_table.read_program(text))
    rendered = table.render(steps=len(arguments), top=40)
    (folder / "table.txt").write_text(rendered + "\n", encoding="utf-8")
    print(rendered, flush=True)


if __name__ == "__main__":
    run(main)
