"""The command line of `ternary`. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from pallas_kernels.command_line import App, Force, Json, Quiet, print_json
from ternary.commands.calibrate import calibrate
from ternary.commands.distill import distill
from ternary.commands.report import report
from ternary.commands.telling import tell_checkpoint

app = App(
    name="ternary",
    help="1.58-bit FLUX: quantise a transformer to -1, 0 and +1, and look into the result.",
    no_args_is_help=True,
)

app.command()(calibrate)
app.command()(distill)
app.command()(report)


@app.command()
def quantize(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="tiny, a diffusers folder or hub id, a Black Forest Labs file, or a Flax "
            "checkpoint.",
            show_default=False,
        ),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to be made.", show_default=False)
    ],
    granularity: Annotated[
        str, typer.Option(help="What shares a scale: tensor, channel, or group128.")
    ] = "channel",
    activation_bits: Annotated[
        int, typer.Option(help="16, or 8 for int8 activations with a scale per token.")
    ] = 16,
    refit: Annotated[
        int, typer.Option(min=0, help="Least-squares refits of the scale after the absolute mean.")
    ] = 0,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Linears to be ternary, by pattern (`*` stands for anything); may be repeated.",
            show_default="every linear of every block",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Linears that stay as they are; may be repeated.", show_default="none"),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Round a transformer to ternary weights, without training.

    The target is a whole pipeline in diffusers' layout whose transformer is ternary; the other
    parts are copied. It appears complete or not at all.

    \b
    Examples:
      python -m ternary quantize tiny OUT
      python -m ternary quantize black-forest-labs/FLUX.1-dev OUT --granularity group128 --refit 3
    """
    # Late: JAX takes a second, and --help should not.
    from tqdm import tqdm

    from ternary.config import QuantConfig
    from ternary.policy import DEFAULT_PATTERNS, Policy
    from ternary.storage.rounding import quantize_checkpoint

    quant = QuantConfig(granularity=granularity, activation_bits=activation_bits, refit_steps=refit)
    policy = Policy(include=tuple(include or DEFAULT_PATTERNS), exclude=tuple(exclude or ()))
    with tqdm(unit="B", unit_scale=True, desc="quantize", disable=quiet, file=sys.stderr) as bar:

        def advance(nbytes: int) -> None:
            bar.update(nbytes)

        counted = quantize_checkpoint(
            src,
            dst,
            quant,
            policy,
            force=force,
            on_start=lambda nbytes: bar.reset(nbytes),
            on_bytes=advance,
        )
    tell_checkpoint(dst, counted, json=json, quiet=quiet)


@app.command()
def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A ternary checkpoint, or its transformer.", show_default=False
        ),
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show each ternary layer: share of zeros, mean scale, error, bits; and the totals.

    Every ternary tensor is read, and its checksum and digits are checked.

    \b
    Examples:
      python -m ternary inspect OUT
      python -m ternary inspect OUT --json
    """
    from tqdm import tqdm

    from ternary.storage.inspection import inspect_checkpoint, table

    with tqdm(desc="inspect", unit=" layers", disable=quiet or json, file=sys.stderr) as bar:

        def advance(total: int) -> None:
            bar.total = total
            bar.update()

        report = inspect_checkpoint(folder, on_layer=advance)
    if json:
        print_json(dataclasses.asdict(report))
    else:
        typer.echo("\n".join(table(report)))
