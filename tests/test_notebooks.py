"""The notebooks run, on the shipped models, in their short form; what is committed is whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tools import notebooks

FOUND = notebooks.notebooks()
MISSING = [n for n in ("nbclient", "ipykernel", "matplotlib") if not importlib.util.find_spec(n)]


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def test_there_are_four():
    assert len(FOUND) == 4


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_outputs_are_committed(path):
    """Every code cell was run, in order, without an error, and there are pictures."""
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1_000_000


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """In the short form, which differs in one cell: fewer steps, smaller pictures of the same."""
    done = notebooks.execute(path, quick=True)
    ran = [cell.execution_count for cell in done.cells if cell.cell_type == "code"]
    assert None not in ran


def test_the_short_form_has_one_place():
    import nbformat

    notebook = nbformat.v4.new_notebook()
    notebook.cells.append(nbformat.v4.new_code_cell("STEPS = 100"))
    with pytest.raises(ValueError, match="expected one cell of parameters .* got 0"):
        notebooks.shorten(notebook)
    notebook.cells[0].metadata = {"tags": ["parameters"], "quick": "STEPS = 2"}
    notebooks.shorten(notebook)
    assert notebook.cells[0].source == "STEPS = 2"
