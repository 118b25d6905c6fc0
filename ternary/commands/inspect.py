"""`python -m ternary inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pallas_kernels.command_line import Json, Quiet, print_json
from ternary.commands.telling import inspection_bar


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
    from ternary.storage.inspection import inspect_checkpoint, table

    with inspection_bar(quiet=quiet or json) as advance:
        report = inspect_checkpoint(folder, on_layer=advance)
    if json:
        print_json(dataclasses.asdict(report))
    else:
        typer.echo("\n".join(table(report)))
