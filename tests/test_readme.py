"""What the README promises: its snippet runs, its commands and options exist."""

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


def commands() -> list[tuple[str, ...]]:
    """(module, subcommands or "", options...) of every `python -m` command in the README."""
    found = set()
    for line in re.findall(r"python -m (?:flux_jax|convert)[^`\n|]*", README):
        words = line.split()[2:]
        module, rest = words[0], words[1:]
        options = sorted(word for word in rest if word.startswith("--"))
        subcommand = rest[0] if module == "flux_jax" else ""
        if subcommand == "evaluate" and len(rest) > 1:
            subcommand += f" {rest[1]}"
        found.add((module, subcommand, *options))
    return sorted(found)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_options_exist(command):
    module, subcommand, *options = command
    arguments = [sys.executable, "-m", module, *subcommand.split(), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for option in options:
        assert re.search(rf"{option}\b", done.stdout), f"{' '.join(command)}: no option {option}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"demo", "test", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}: no such target"


def test_linked_files_exist():
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
