"""What several commands show: the checkpoint that was made, and how far one is inspected."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
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
            f"are ternary; {size / 1e6:,.1f} MB of files, {2 * coverage.total / size:.2f} times "
            "smaller than bf16"
        )


@contextlib.contextmanager
def inspection_bar(*, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for `inspect_checkpoint` and its like, as what they tell of each layer."""
    # Late: --help should be quick.
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        bars = []

        def advance(total: int) -> None:
            # Not before there is a layer: what cannot be opened is refused in one line.
            if not bars:
                bar = tqdm(desc="inspect", unit=" layers", disable=quiet, file=sys.stderr)
                bars.append(stack.enter_context(bar))
            bars[0].total = total
            bars[0].update()

        yield advance
