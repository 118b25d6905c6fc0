"""The Python of the pages on ternary training, as it stands there: public names, and it runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flux_jax.checkpoint import load_checkpoint
from flux_jax.linears import linears
from ternary import TernaryLinear, inspect_checkpoint
from tests.jobs import with_devices

DOCS = Path(__file__).resolve().parents[2] / "docs"
FLUX, ANY, CALIBRATION = (
    block
    for page in ("distillation.md", "ternary_calibration.md")
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)
)


def run(block, folder):
    command = [sys.executable, "-c", block]
    done = subprocess.run(
        command, cwd=folder, env=with_devices(1), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", [FLUX, ANY, CALIBRATION], ids=["flux", "any", "calibration"])
def test_only_public_names_are_used(block):
    found = re.findall(r"^from ((?:flux_jax|ternary|convert)[\w.]*) import (.*)$", block, re.M)
    assert found
    for package, names in found:
        assert set(names.split(", ")) <= set(importlib.import_module(package).__all__), package


@pytest.mark.slow
def test_a_loop_of_ones_own_makes_a_student_that_draws(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run(FLUX, tmp_path))]
    assert losses[-1] < 0.8 * losses[0]
    student = load_checkpoint(tmp_path / "student", components=["transformer"])
    assert len(linears(student.modules["transformer"], TernaryLinear)) == 3 * 10 + 6 * 3
    assert (tmp_path / "star.png").exists()


@pytest.mark.slow
def test_a_module_of_ones_own_is_trained_on_split_state(tmp_path):
    loss, bits = re.findall(r"loss (\S+), (\S+) bits", run(ANY, tmp_path))[0]
    assert float(loss) < 0.3
    assert float(bits) < 3


@pytest.mark.long
def test_the_calibration_of_the_page_makes_a_checkpoint(tmp_path):
    run(CALIBRATION, tmp_path)
    assert len(inspect_checkpoint(tmp_path / "calibrated").layers) == 3 * 10 + 6 * 3
