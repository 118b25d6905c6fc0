"""What the README promises: its snippet runs, its targets and files exist.

Its commands are checked with those of the pages, in test_docs.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_quick_start_draws_an_image(tmp_path):
    from PIL import Image

    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippet.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (128, 128)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"demo", "test", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}: no such target"


def test_linked_files_exist():
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
