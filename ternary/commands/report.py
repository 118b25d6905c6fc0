"""`python -m ternary report`."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Annotated

import typer

from flux_jax.assets import resolve
from flux_jax.errors import UserError
from pallas_kernels.command_line import Force, Json, Quiet, check_folder_of, print_json
from ternary.commands.telling import inspection_bar


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A folder of `distill`; it may still grow.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML file.", show_default="RUN/report.html"),
    ] = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score",
            help="First draw the composition prompts with teacher, student and plain rounding, and "
            "score them; the pictures stay in RUN/evaluation, and a stopped call goes on.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="With --score: prompts of each category.", show_default="all, 120"),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="The student, if it lies elsewhere: a folder, or tiny-ternary.",
            show_default="RUN/student",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The teacher, if it lies elsewhere by now.", show_default="the settings'"
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a distillation run as one HTML page.

    Settings, curves, composition score by category, pictures of teacher and student,
    zeros and error by layer, sizes. The page is one file that needs no network. A run that is in
    progress, was killed, or lacks parts is shown as far as it goes.

    \b
    Examples:
      python -m ternary report RUN
      python -m ternary report RUN --score --limit 10 --force
      python -m ternary report RUN --out report.html --quiet
    """
    # Late: JAX takes a second, and --help should not.
    from ternary.run_report.folder import read_run
    from ternary.run_report.layers import inspect_student
    from ternary.run_report.page import render, write_page
    from ternary.run_report.scores import (
        Evaluations,
        check_teacher,
        find_student,
        of_others,
        read_evaluations,
    )
    from ternary.run_report.scores import score as score_run

    if limit is not None and not score:
        raise UserError("--limit is of --score: give both, or neither")
    found = read_run(run)
    target = run / "report.html" if out is None else out
    if target.exists() and not force:
        raise UserError(f"{target}: exists already; --force replaces it")
    check_folder_of("--out", target)
    folder = find_student(found, student)
    check_teacher(teacher)
    named = teacher or found.settings.get("teacher")
    if score:
        if folder is None or not isinstance(named, str):
            lacks = "teacher" if folder is not None else "student"
            raise UserError(f"{run} names no {lacks} to score: give --{lacks}")
        from flux_jax.compile_cache import enable_compilation_cache

        enable_compilation_cache()
        score_run(found, folder, named, limit=limit, progress=not quiet)
    inspected, distances = None, {}
    if folder is not None:
        teacher_name = named if isinstance(named, str) else None
        with inspection_bar(quiet=quiet) as advance:
            try:
                inspected, distances = inspect_student(folder, teacher_name, on_layer=advance)
            except UserError as error:
                if teacher is not None or teacher_name is None:
                    raise
                # The student, if it is not that which cannot be read, is shown without.
                inspected, distances = inspect_student(folder, None, on_layer=advance)
                lacks = f"The teacher cannot be read: {error}."
                found = dataclasses.replace(found, missing=(*found.missing, lacks))
    now = datetime.datetime.now(datetime.UTC)
    evaluations = read_evaluations(found)
    others = of_others(
        evaluations,
        student=None if student is None else folder,
        teacher=None if teacher is None else resolve(teacher),
    )
    if others:
        evaluations = Evaluations(columns=())
        found = dataclasses.replace(found, missing=(*found.missing, *others))
    page = render(found, evaluations, inspected, distances, now=now)
    write_page(target, page)
    size = target.stat().st_size
    if json:
        print_json({"path": str(target), "bytes": size})
    elif not quiet:
        typer.echo(f"{target}: {size / 1e6:.2f} MB")
