"""`python -m flux_jax demo`: what `make demo` shows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flux_jax.assets import STUDENT, TEACHER, shipped_path
from flux_jax.cli import app, common
from flux_jax.cli.demo import CAPTION, MARGIN, SIDE
from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.detector import detect
from flux_jax.composition.score import judge

CLAIM = Claim(
    groups=(Group(shape="circle", color="red"), Group(shape="square", color="blue")),
    relation="above",
)


@pytest.mark.slow
def test_teacher_and_student_both_show_what_the_prompt_says(tmp_path):
    out = tmp_path / "demo.png"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(result.stdout)
    with Image.open(out) as image:
        picture = image.convert("RGB")
    assert picture.size == (2 * (SIDE + MARGIN) + MARGIN, SIDE + MARGIN + CAPTION)
    halves = []
    for index in range(2):
        left = MARGIN + index * (SIDE + MARGIN)
        half = picture.crop((left, MARGIN, left + SIDE, MARGIN + SIDE)).resize((128, 128))
        verdict = judge(detect(np.asarray(half)), CLAIM, counting=False)
        assert verdict.passed, verdict.reasons
        halves.append(np.asarray(half, np.float64))
    assert not np.array_equal(*halves)
    sizes = report["transformer_bytes"]
    for name in (TEACHER, STUDENT):
        stored = (shipped_path(name) / "transformer").iterdir()
        assert sizes[name] == sum(file.stat().st_size for file in stored)
    assert sizes[TEACHER] > 8 * sizes[STUDENT]
    error = np.mean((halves[0] - halves[1]) ** 2)
    # Measured on the pictures as they were drawn; here they went through a resize and back.
    assert report["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error), abs=1.0)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    class Pipe:
        def __call__(self, *_, **__):
            # Not there before the drawing, when it would be refused at once.
            (tmp_path / "demo.png").mkdir(exist_ok=True)
            return SimpleNamespace(images=np.random.default_rng(0).random((1, 8, 8, 3)))

    loaded = SimpleNamespace(pipe=Pipe(), prompts=None)
    monkeypatch.setattr(common, "load_and_encode", lambda *_, **__: loaded)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo.png")])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'demo.png'}: cannot be written: ")


def test_no_folder_to_write_to(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "none" / "demo.png")])
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
