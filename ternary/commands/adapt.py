"""`python -m ternary adapt`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pallas_kernels.command_line import Json, Quiet, print_json
from ternary.commands.options import MODEL_HELP, PromptFile, Teacher


def adapt(
    teacher: Teacher,
    student: Annotated[
        str, typer.Option(help=f"The ternary pipeline: {MODEL_HELP}", show_default=False)
    ],
    lora: Annotated[
        str,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="The teacher's LoRA: a safetensors file or a hub id.",
            show_default=False,
        ),
    ],
    prompts: PromptFile,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The run's folder; a run that is there goes on.", show_default=False
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="States of a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    remat: Annotated[
        bool, typer.Option("--remat", help="Recompute blocks in the gradient: memory for time.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adapt a teacher's LoRA to its ternary student, from prompts alone.

    Beside other weights a LoRA does little. Its factors are trained, so that the student with them
    computes what the teacher with the LoRA does; both models' weights stay as they are. The result
    is OUT/lora.safetensors, for this student. A run that was killed goes on when the command is
    given again.

    \b
    Examples:
      python -m ternary adapt --teacher tiny --student tiny-ternary --lora style.safetensors \\
        --prompts prompts.txt --out RUN
      python -m ternary adapt --teacher black-forest-labs/FLUX.1-dev --student ~/flux-dev-ternary \\
        --lora owner/name --prompts prompts.txt --batch-size 1 --remat --out RUN
    """
    # Late: JAX takes a second, and --help should not.
    from flux_jax.compile_cache import enable_compilation_cache
    from ternary.config import AdaptConfig
    from ternary.distillation.adapt import AdaptTask, adapt_lora

    config = AdaptConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        remat=remat,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    enable_compilation_cache()
    task = AdaptTask(teacher=teacher, student=student, lora=lora, prompts=prompts)
    found = adapt_lora(task, out, config, progress=not quiet)
    if json:
        print_json({**dataclasses.asdict(found), "lora": str(found.lora)})
    elif not quiet:
        typer.echo(
            f"{found.lora}: {found.steps:,} steps; squared error of the velocity, of the teacher's "
            f"square with the LoRA: {found.first:.4f} at first, {found.last:.4f} at last"
        )
