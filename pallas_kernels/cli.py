"""The command line. Nothing heavy is imported until a command runs, so `--help` is quick."""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.command_line import (
    App,
    Json,
    Quiet,
    before_commands,
    check_folder_of,
    print_json,
)
from pallas_kernels.errors import UserError

app = App(
    name="pallas_kernels",
    help="Products with packed ternary weights: prove, time and tune the backends of this machine.",
    no_args_is_help=True,
)
app.callback()(before_commands)

Backend = Annotated[
    list[str] | None,
    typer.Option(
        help="mosaic, triton or jax; may be repeated.", show_default="every one that can run here"
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        help="TOKENSxINPUTSxOUTPUTS, such as 4608x3072x9216; may be repeated.",
        show_default="a large image transformer's; on a CPU one small shape",
    ),
]
TunedBackend = Annotated[
    list[str] | None,
    typer.Option(
        help="mosaic or triton; may be repeated.", show_default="every one that can run here"
    ),
]
TunedShape = Annotated[
    list[str] | None,
    typer.Option(
        help="TOKENSxINPUTSxOUTPUTS, such as 4608x3072x9216; may be repeated.",
        show_default="a large image transformer's",
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Timings that each median is over.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Also write the JSON to this file.", show_default="none"),
]


@app.command()
def check(
    backend: Backend = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random arguments.")] = 0,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare every backend with exact integers and float64; exit code 1 if one is wrong.

    Without a GPU the Mosaic kernels run in Pallas' interpret mode, on a few small cases: all of
    them but the decoding of codes in registers.

    \b
    Examples:
      python -m pallas_kernels check
      python -m pallas_kernels check --backend mosaic --json
    """
    from pallas_kernels import checking

    _check_out(out)
    runs = check_runs(backend)
    outcomes = []
    for name, cases, multiply in runs:
        for case in cases:
            outcome = checking.check(case, name, multiply, seed)
            outcomes.append(outcome)
            # With --json, the lines are progress.
            if not (json and quiet):
                verdict = "ok" if outcome.passed else "WRONG"
                repeats = "" if outcome.repeats else ", other bits in a second run"
                share = f"error {outcome.error:.3f} of the bound{repeats}"
                typer.echo(f"{verdict:5}  {name:20}  {case!s:58}  {share}", err=json)
    passed = all(outcome.passed for outcome in outcomes)
    rows = [
        {
            "backend": outcome.backend,
            "case": str(outcome.case),
            # JSON has no infinity.
            "error": outcome.error if math.isfinite(outcome.error) else None,
            "repeats": outcome.repeats,
            "passed": outcome.passed,
        }
        for outcome in outcomes
    ]
    report({"passed": passed, "cases": rows}, out, json, quiet)
    if not passed:
        raise typer.Exit(1)


@app.command()
def bench(
    shape: Shape = None,
    backend: Backend = None,
    few: Annotated[
        bool, typer.Option("--few", help="Also products of 1 and 16 tokens, without --shape.")
    ] = False,
    repeats: Repeats = 10,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time every backend, and XLA's dense bf16 and int8 products, at the same shapes.

    \b
    Examples:
      python -m pallas_kernels bench --out bench.json
      python -m pallas_kernels bench --shape 4608x3072x9216 --backend mosaic
    """
    from pallas_kernels import bench as measuring

    _check_out(out)
    names = kernels_here(backend, or_jax=True)
    if shape and few:
        raise UserError("--few goes without --shape: give 1xINPUTSxOUTPUTS as a shape")
    shapes = shapes_of(shape, few=few)
    rows = []
    for m, k, n in shapes:
        for row in measuring.time_shape(m, k, n, backends=names, repeats=repeats):
            rows.append(row)
            if not quiet:
                typer.echo(f"{m}x{k}->{n} {row.what} {row.backend}: {row.ms:.4f} ms", err=True)
    if not json:
        typer.echo("\n".join(measuring.table(rows)))
    report({"rows": [dataclasses.asdict(row) for row in rows]}, out, json, quiet)


@app.command()
def tune(
    shape: TunedShape = None,
    backend: TunedBackend = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Of the activations; may be repeated.", show_default="8 and 16"),
    ] = None,
    grouped: Annotated[
        bool, typer.Option("--grouped", help="For a scale per group of 128 inputs.")
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="The table to extend.", show_default="the package's, of this device"),
    ] = None,
    repeats: Repeats = 5,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try tiles for products, and put the fastest into the table of this kind of device.

    An entry is written as soon as it is found. This needs a GPU; the exit code is 1 if no tile of a
    product could run.

    \b
    Examples:
      python -m pallas_kernels tune --shape 4608x3072x9216 --bits 8
    """
    from pallas_kernels import tile_table
    from pallas_kernels.backends import describe, device_of
    from pallas_kernels.tiles import Problem

    for value in bits or ():
        if value not in (8, 16):
            raise UserError(f"--bits must be 8 or 16, got {value}")
    _check_out(out)
    names = kernels_here(backend, or_jax=False)
    device = describe(device_of(None))
    path = table or tile_table.file_of(device.kind)
    # What cannot be written, or is no table of this device, is refused before the search.
    check_folder_of("--table", path, make=True)
    if path.exists():
        tile_table.read_entries(path, device.kind)
    entries, failures, without = [], [], []
    problems = [
        Problem(m=m, n=n, k=k, activation_bits=width, grouped=grouped)
        for m, k, n in shapes_of(shape, few=False)
        for width in bits or (8, 16)
    ]
    for problem in problems:
        for name in names:
            entry, failed = tune_one(name, problem, device, repeats, quiet)
            failures += failed
            if entry is None:
                m, n, k, width, _ = dataclasses.astuple(problem)
                without.append(f"{m}x{k}x{n} with {width} bits on {name}")
            else:
                entries.append(entry)
                tile_table.write_entries(device.kind, [entry], path)
    if not json:
        for entry in entries:
            typer.echo(json_module.dumps(entry.to_json()))
    found = {
        "table": path.name if entries else None,
        "entries": [entry.to_json() for entry in entries],
        "failures": failures,
    }
    report(found, out, json, quiet)
    if without:
        typer.echo(f"error: no tile could run: {', '.join(without)}", err=True)
        raise typer.Exit(1)


def tune_one(name: str, problem: Any, device: Any, repeats: int, quiet: bool) -> tuple[Any, list]:
    """The entry that was found, and the tiles that could not run."""
    from pallas_kernels import tuning

    trials = []
    for trial in tuning.search(name, problem, device, repeats=repeats):
        trials.append(trial)
        if not quiet:
            result = f"{trial.ms:.4f} ms" if trial.ms else f"failed: {trial.failure}"
            typer.echo(f"{name} {problem} {trial.tile}: {result}", err=True)
    failed = [f"{name} {problem} {t.tile}: {t.failure}" for t in trials if t.ms is None]
    return tuning.fastest(name, problem, trials), failed


# More than any memory holds, and few enough for JAX to count them.
_MOST_VALUES = 10**14


def shapes_of(texts: list[str] | None, *, few: bool) -> tuple[tuple[int, int, int], ...]:
    """(tokens, inputs, outputs) of each --shape; without one, what suits the device.

    Raises:
      UserError: a text that is no shape.
    """
    from pallas_kernels import bench as measuring
    from pallas_kernels.backends import compute_capability, device_of

    if texts:
        shapes = []
        for text in texts:
            match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
            if match is None:
                raise UserError(
                    f"--shape must be TOKENSxINPUTSxOUTPUTS, such as 4608x3072x9216, got {text!r}"
                )
            m, k, n = (int(number) for number in match.groups())
            if max(m * k, k * n, m * n) > _MOST_VALUES:
                raise UserError(
                    f"--shape must have at most {_MOST_VALUES} values in a matrix, got {text!r}"
                )
            shapes.append((m, k, n))
        return tuple(shapes)
    if compute_capability(device_of(None)) is None:
        return measuring.SMALL
    return (*measuring.FEW, *measuring.MANY) if few else measuring.MANY


def kernels_here(names: list[str] | None, *, or_jax: bool) -> tuple[str, ...]:
    """The backends that are asked for, or all that can run here.

    Raises:
      UserError: an unknown one, one that cannot run here, or none at all.
    """
    from pallas_kernels.bench import backends_here

    reasons = backends_here()
    if not or_jax:
        reasons["jax"] = "it has no tiles"
    for name in names or ():
        if name not in reasons:
            raise UserError(f"--backend must be one of {', '.join(reasons)}, got {name!r}")
        if reasons[name]:
            raise UserError(f"--backend {name} cannot be used here: {reasons[name]}")
    chosen = tuple(names or (name for name, reason in reasons.items() if reason is None))
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"no backend can be used here ({why})")
    return chosen


def check_runs(names: list[str] | None) -> list[tuple[str, Any, Any]]:
    """(name, cases, multiply) of each backend that is to be checked."""
    from pallas_kernels import checking
    from pallas_kernels.bench import backends_here

    interpret = backends_here()["mosaic"] is not None and (names is None or "mosaic" in names)
    asked = None if names is None else [n for n in names if n != "mosaic" or not interpret]
    chosen = kernels_here(asked, or_jax=True) if asked is None or asked else ()
    runs: list[tuple[str, Any, Any]] = [
        (name, checking.CASES, checking.public_op(name)) for name in chosen
    ]
    if interpret:
        multiply = checking.interpreted_mosaic()
        runs.append(("mosaic, interpreted", checking.SMALL_CASES, multiply))
    return runs


def _check_out(out: Path | None) -> None:
    if out is not None:
        check_folder_of("--out", out)


def report(content: dict[str, Any], out: Path | None, json: bool, quiet: bool) -> None:
    """Adds where it was measured; prints and writes it, as is asked for.

    Raises:
      UserError: it cannot be written.
    """
    import jax

    from pallas_kernels.files import write_whole

    device = jax.devices()[0]
    full = {"device": device.device_kind, "jax": jax.__version__, **content}
    if json:
        print_json(full)
    if out is not None:
        try:
            write_whole(out, json_module.dumps(full, indent=2) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--out {out}: cannot be written: {reason}") from error
        if not quiet:
            typer.echo(f"written: {out}", err=True)
