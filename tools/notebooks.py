"""Runs the notebooks and keeps their outputs.

    python -m tools.notebooks            # all of notebooks/, written in place
    python -m tools.notebooks --quick    # the short form, as the tests run it; nothing is written
    python -m tools.notebooks PATH ...

A cell tagged `parameters` says how long a notebook runs; its metadata has, under `quick`, what
stands in its place in the short form.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.blocks import ROOT

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = ROOT / "notebooks"
CELL_TIMEOUT = 3600
# What a notebook leaves behind that another machine would not.
_TRANSIENT = ("execution", "collapsed", "scrolled")


def notebooks() -> list[Path]:
    """All of them, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def shorten(notebook: NotebookNode) -> None:
    """Put the short form's parameters in place.

    Raises:
      ValueError: no cell has them, or more than one.
    """
    cells = [cell for cell in notebook.cells if "quick" in cell.metadata]
    if len(cells) != 1 or "parameters" not in cells[0].metadata.get("tags", []):
        raise ValueError(f"expected one cell of parameters with a quick form, got {len(cells)}")
    cells[0].source = cells[0].metadata["quick"]


def execute(path: Path, *, quick: bool) -> NotebookNode:
    """The notebook with new outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    # Late: the parsers of the other tools need none of it.
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    if quick:
        shorten(notebook)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # A notebook says itself how many devices it wants.
        "XLA_FLAGS": "",
    }
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        for key in _TRANSIENT:
            cell.metadata.pop(key, None)
        # Warnings of libraries, with the paths of this machine.
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", show_default="all of notebooks/")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The short form; nothing is written.")
    ] = False,
) -> None:
    """Runs notebooks, and writes their outputs into them."""
    import nbformat

    for path in paths or notebooks():
        start = time.perf_counter()
        notebook = execute(path, quick=quick)
        if not quick:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
