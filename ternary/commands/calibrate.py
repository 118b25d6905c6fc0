"""`python -m ternary calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_jax.errors import UserError
from pallas_kernels.command_line import Force, Json, Quiet
from ternary.commands.options import (
    ActivationBits,
    Exclude,
    Granularity,
    Include,
    PromptFile,
    Refit,
    Teacher,
)
from ternary.commands.telling import tell_checkpoint


def calibrate(
    teacher: Teacher,
    prompts: PromptFile,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to be made.", show_default=False)
    ],
    granularity: Granularity = "channel",
    activation_bits: ActivationBits = 16,
    refit: Refit = 0,
    rank: Annotated[int, typer.Option(min=0, help="Of a 16-bit branch beside each weight.")] = 0,
    learned_scale: Annotated[
        bool, typer.Option("--learned-scale", help="Train the scales beside the weights.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    samples: Annotated[int, typer.Option(help="States at which each block is trained.")] = 256,
    states_each: Annotated[int, typer.Option(help="States from one trajectory.")] = 4,
    sampling_steps: Annotated[int, typer.Option(help="Euler steps of a trajectory.")] = 20,
    guidance: Annotated[
        tuple[float, float], typer.Option(help="Range of the guidance scale (dev).")
    ] = (1.0, 5.0),
    steps: Annotated[int, typer.Option(help="Optimiser steps of each block.")] = 200,
    batch_size: Annotated[int, typer.Option(help="States of a step.")] = 8,
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a batch is computed: memory for time.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-3,
    optimizer: Annotated[str, typer.Option(help="adamw, adafactor or lion.")] = "adamw",
    compute_dtype: Annotated[
        str, typer.Option(help="Of all passes: bfloat16 or float32.")
    ] = "bfloat16",
    master_dtype: Annotated[
        str, typer.Option(help="Of the latent weights: float32 or bfloat16.")
    ] = "float32",
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Train only the first so many blocks, or those named, with commas between.",
            show_default="all",
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Of the images, in pixels.", show_default="the model's own")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Of the images, in pixels.", show_default="the model's own")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of T5.", show_default="the model's own")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    latents: Annotated[
        bool, typer.Option(help="Also write the latent weights, from which distill starts.")
    ] = True,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a transformer ternary and train it block by block, from prompts alone.

    One block is on the device at a time. The target is a whole pipeline in diffusers' layout whose
    transformer is ternary, with the latent weights beside it. A run that was killed goes on where
    it was: finished blocks wait in OUT.calibration.

    \b
    Examples:
      python -m ternary calibrate --teacher tiny --prompts prompts.txt --out OUT
      python -m ternary calibrate --teacher black-forest-labs/FLUX.1-dev --prompts prompts.txt \\
        --out OUT --batch-size 4 --accumulate 4
    """
    # Late: JAX takes a second, and --help should not.
    from convert.hub import local_path
    from convert.replaceable import check_target
    from flux_jax.assets import resolve
    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.prompt_file import read_prompts
    from ternary.calibration.run import (
        calibrate_checkpoint,
        check_teacher,
        choose_prompts,
        encode_prompts,
        image_grid,
        texts_fingerprint,
    )
    from ternary.config import CalibrateConfig, QuantConfig
    from ternary.policy import DEFAULT_PATTERNS, Policy

    quant = QuantConfig(
        granularity=granularity,
        activation_bits=activation_bits,
        refit_steps=refit,
        rank=rank,
        learned_scale=learned_scale,
    )
    policy = Policy(include=tuple(include or DEFAULT_PATTERNS), exclude=tuple(exclude or ()))
    config = CalibrateConfig(
        samples=samples,
        states_each=states_each,
        sampling_steps=sampling_steps,
        guidance=guidance,
        batch_size=batch_size,
        accumulate=accumulate,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=optimizer,
        compute_dtype=compute_dtype,
        master_dtype=master_dtype,
        blocks=parse_blocks(blocks),
        seed=seed,
    )
    out = local_path(out)
    check_target(out, force=force)
    enable_compilation_cache()
    texts = read_prompts(prompts)
    src = resolve(teacher)
    check_teacher(src, out, quant, policy, config)
    grid = image_grid(src, height, width)
    texts = choose_prompts(texts, config)
    with Bars(config.steps, quiet=quiet) as bars:
        encoded = encode_prompts(
            src,
            texts,
            max_sequence_length=max_sequence_length,
            on_progress=lambda done, total: bars.show("prompts", done, total),
        )
        result = calibrate_checkpoint(
            src,
            out,
            encoded,
            quant,
            policy,
            config,
            grid=grid,
            latents=latents,
            force=force,
            listener=bars.listener(),
            prompts_name=texts_fingerprint(texts, max_sequence_length),
        )
    tell_checkpoint(out, result.coverage, json=json, quiet=quiet)


def parse_blocks(text: str | None) -> int | tuple[str, ...] | None:
    """`--blocks`: a number, names with commas between, or nothing."""
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"--blocks must be a number or names of blocks, got {text!r}")
    return names


class Bars:
    """Progress on stderr: a bar for each stage, then one for each part, with its loss."""

    def __init__(self, steps: int, *, quiet: bool):
        self._steps = steps
        self._quiet = quiet
        self._bar: Any = None
        self._what = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def listener(self) -> Any:
        """What `calibrate_checkpoint` tells."""
        from ternary.calibration.calibrator import Listener

        bars = self

        class Shown(Listener):
            def on_weights(self, done: int, total: int) -> None:
                bars.show("weights", done, total, unit="B")

            def on_states(self, done: int, total: int) -> None:
                bars.show("trajectories", done, total)

            def on_step(self, part: Any, step: int, loss: float) -> None:
                bars.show(part.name, step, bars._steps)
                bars._bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)

            def on_part(self, part: Any, report: Any) -> None:
                bars._close()
                if not bars._quiet:
                    change = f"{report.before:.4g} -> {report.after:.4g}"
                    line = f"{part.name}: loss {change} in {report.seconds:.1f} s"
                    print(line, file=sys.stderr)

        return Shown()

    def show(self, what: str, done: int, total: int, unit: str = "it") -> None:
        """Set the bar of a stage; the bar of another one ends."""
        from tqdm import tqdm

        if what != self._what:
            self._close()
            self._what = what
            self._bar = tqdm(
                total=total,
                desc=what,
                unit=unit,
                unit_scale=unit == "B",
                disable=self._quiet,
                file=sys.stderr,
                leave=False,
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ""
