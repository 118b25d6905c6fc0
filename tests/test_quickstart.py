"""The quick start, command for command: from a shipped model to a student and its report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.jobs import with_devices

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quickstart.md"
# What the page sets, and how much of it is enough to see that the commands work.
SHORTER = {
    "distill.steps=160": "distill.steps=4",
    "distill.warmup=10": "distill.warmup=1",
    "batch_size=12": "batch_size=2",
    "sample_every=40": "sample_every=2",
    "checkpoint_every=20": "checkpoint_every=2",
    "sampling_steps=10": "sampling_steps=1",
    "held_out=4": "held_out=2",
}
# Of another test: `make demo` installs, and the environment is the one that runs this.
INSTALLS = "make demo\nsource .venv/bin/activate\n"


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.S))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.long
def test_the_commands_of_the_page_lead_to_a_student_and_its_report(tmp_path):
    script = blocks("bash")
    for long, short in {**SHORTER, INSTALLS: ""}.items():
        assert script.count(long) == 1, long
        script = script.replace(long, short)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**with_devices(1), "PATH": path}
    shell = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(pixels(tmp_path / "stars.png"), pixels(tmp_path / "again.png"))
    # Rounded without training, the same seed draws something else.
    rounded = pixels(tmp_path / "rounded.png") != pixels(tmp_path / "stars.png")
    assert rounded.mean() > 0.5
    for made in ("heart.png", "run/student/model_index.json"):
        assert (tmp_path / made).exists(), made
    assert "<html" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert len((tmp_path / "prompts.txt").read_text().splitlines()) == 64


@pytest.mark.slow
def test_the_python_of_the_page_draws(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "from_python.png").shape == (128, 128, 3)
