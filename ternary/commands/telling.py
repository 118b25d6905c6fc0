"""What the commands that make a ternary checkpoint print at their end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pallas_kernels.command_line import print_json

if TYPE_CHECKING:
    from ternary.policy import Coverage


def tell_checkpoint(folder: Path, coverage: Coverage, *, json: bool, quiet: bool) -> None:
    """One line, or one JSON object, on stdout: the share that is ternary, and the size."""
    size = sum(file.stat().st_size for file in (folder / "transformer").iterdir())
    if json:
        found = {"parameters": coverage.total, "ternary_share": coverage.fraction}
        print_json({"path": str(folder), **found, "transformer_bytes": size})
    elif not quiet:
        typer.echo(
            f"{folder}: {coverage.fraction:.2%} of the transformer's {coverage.total:,} parameters "
            f"are ternary; {size / 1e6:,.1f} MB, {2 * coverage.total / size:.2f} times smaller "
            "than bf16"
        )
