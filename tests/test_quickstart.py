"""docs/quickstart.md, copied command by command, ends in a student and its report."""

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

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
# What `make demo` and the activation of its environment do, these tests run in already.
SET_UP = ("make ", "source ")
# The page's settings, and as few steps as show every part of a run.
SHORTER = {"distill.steps=160": "distill.steps=6", "sample_every=40": "sample_every=3"}


def script() -> str:
    """All of the page's shell commands, in order, for a short run."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    text = "\n".join(line for line in lines if not line.startswith(SET_UP))
    for long, short in SHORTER.items():
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    return text


@pytest.mark.long
def test_the_commands_of_the_page_end_in_a_report(tmp_path):
    # The page's `python` is the one that runs this test.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script()],
        cwd=tmp_path,
        env={**with_devices(1), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    def pixels(name: str) -> np.ndarray:
        with Image.open(tmp_path / name) as image:
            return np.asarray(image)

    np.testing.assert_array_equal(pixels("stars.png"), pixels("again.png"))
    # Rounded without training, the same seed draws something else.
    assert (pixels("rounded.png") != pixels("stars.png")).mean() > 0.5
    assert pixels("heart.png").shape == (128, 128, 3)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "data:image/webp" in page
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 7
