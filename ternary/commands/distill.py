"""`python -m ternary distill`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flux_jax.cli.common import Distributed
from pallas_kernels.command_line import Json, Quiet, print_json
from pallas_kernels.errors import UserError
from ternary.commands.options import PromptFileOrNone, TeacherOrNone


def distill(
    teacher: TeacherOrNone = None,
    prompts: PromptFileOrNone = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The run's folder; a run that is there goes on.",
            show_default="required",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings, as YAML.", show_default="the defaults")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one setting, as distill.steps=2000; may be repeated.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="What `calibrate` wrote: its latent weights are the start.",
            show_default="the teacher's weights",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Prompts to draw during the run, never trained on: a text file, or composition "
            "for those that come with a score.",
            show_default="some of PROMPTS",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="How the devices are laid out, as data=4,fsdp=2.",
            show_default="the settings', or all devices as data",
        ),
    ] = None,
    distributed: Distributed = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show-config", help="Print the settings as YAML, and end; needs nothing else."
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a ternary student to its teacher's velocities, from prompts alone.

    The run's folder takes everything: settings, metrics (CSV and TensorBoard), pictures of teacher
    and student from the same noise, checkpoints, and at the end student/, a whole pipeline. A run
    that was killed goes on, with the same losses, when the command is given again.

    \b
    Examples:
      python -m ternary distill --teacher tiny --prompts prompts.txt --out RUN \\
        --set distill.steps=200
      python -m ternary distill --show-config > run.yaml
      python -m ternary distill --teacher black-forest-labs/FLUX.1-dev --prompts prompts.txt \\
        --start CALIBRATED --config run.yaml --out RUN
      srun python -m ternary distill --distributed --mesh fsdp=8 --teacher ~/flux-dev \\
        --prompts prompts.txt --config run.yaml --out RUN
    """
    # Late: JAX takes a second, and --help should not.
    from ternary.distillation.run_config import read_run_config, to_yaml

    settings = read_run_config(config, change or ())
    if mesh is not None:
        from flux_jax.sharding import read_mesh

        settings = dataclasses.replace(settings, mesh=read_mesh(mesh))
    if show:
        typer.echo(to_yaml(settings), nl=False)
        return
    if teacher is None or prompts is None or out is None:
        needed = {"--teacher": teacher, "--prompts": prompts, "--out": out}
        missing = [name for name, value in needed.items() if value is None]
        raise UserError(f"missing: {', '.join(missing)}")
    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.processes import Processes, joined_processes
    from ternary.distillation.run import distill
    from ternary.distillation.task import Task

    enable_compilation_cache()
    task = Task(teacher=teacher, prompts=prompts, start=start, held_out=held_out)
    job = joined_processes() if distributed else contextlib.nullcontext(Processes())
    with job as processes:
        outcome = distill(task, out, settings, progress=not quiet)
    if not processes.first:
        return
    if json:
        print_json({**dataclasses.asdict(outcome), "student": str(outcome.student)})
    elif not quiet:
        parts = [f"{outcome.student}: {outcome.steps:,} steps, loss {outcome.loss:.5f}"]
        if outcome.median_psnr is not None:
            parts.append(f"held-out pictures {outcome.median_psnr:.2f} dB (median)")
        if outcome.score is not None:
            parts.append(f"score {outcome.score:.3f} of the teacher's {outcome.teacher_score:.3f}")
        typer.echo("; ".join(parts))
