"""Evaluation: what is drawn, what is not drawn twice, and what is reported."""

from __future__ import annotations

import fcntl
import json
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flux_jax import evaluate as evaluation
from flux_jax.composition.layout import realise
from flux_jax.composition.prompts import CATEGORIES, load_prompts
from flux_jax.composition.render import render, to_uint8
from flux_jax.errors import UserError
from flux_jax.metadata import read_png, save_png
from flux_jax.pipeline import FluxPipeline

SETTINGS = {"num_inference_steps": 1, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def prompts():
    return evaluation.select_prompts(1)


@pytest.fixture(scope="module")
def embeds(pipe, prompts):
    return pipe.encode_prompt([prompt.prompt for prompt in prompts])


def test_selection():
    assert evaluation.select_prompts(None) == load_prompts()
    selected = evaluation.select_prompts(2)
    assert [prompt.category for prompt in selected] == [c for c in CATEGORIES for _ in range(2)]
    with pytest.raises(UserError, match="limit must be at least 1 prompt a category, got 0"):
        evaluation.select_prompts(0)


def test_report(pipe, prompts, embeds, tmp_path):
    result = evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, seed=5, **SETTINGS)
    assert result.drawn == 6
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == result.to_dict()
    assert report["scores"]["overall"]["count"] == 6
    assert report["settings"]["fingerprint"] == pipe.fingerprint()
    assert [image["seed"] for image in report["images"]] == [5, 6, 7, 8, 9, 10]
    for image, prompt in zip(report["images"], prompts, strict=True):
        assert read_png(tmp_path / image["file"]).prompt == image["prompt"] == prompt.prompt
        # Random weights draw no scenes: every failure says why.
        assert image["passed"] == (not image["reasons"])


def test_resuming_draws_only_what_is_missing(pipe, prompts, embeds, tmp_path):
    def evaluate(**options):
        return evaluation.evaluate(
            pipe, tmp_path, prompts=prompts, embeds=embeds, **{**SETTINGS, **options}
        )

    first = evaluate()
    files = sorted(tmp_path.glob("*.png"))
    before = [file.read_bytes() for file in files]
    assert evaluate().drawn == 0
    # One is gone, one was cut off, one is of other settings.
    files[0].unlink()
    files[2].write_bytes(before[2][:-200])
    save_png(Image.open(files[4]), files[4], first.records[3])
    again = evaluate()
    assert again.drawn == 3
    assert again.records == first.records
    for file, content in zip(files, before, strict=True):
        np.testing.assert_allclose(
            np.asarray(Image.open(file), int),
            np.asarray(_decoded(content), int),
            atol=1,  # other neighbours in the batch
        )
    assert evaluate(num_inference_steps=2).drawn == 6
    assert evaluate(num_inference_steps=2, seed=1).drawn == 6


def test_a_report_does_not_outlive_its_pictures(pipe, prompts, embeds, tmp_path, monkeypatch):
    """They are replaced one by one; killed among them, the folder would tell of pictures gone."""
    evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, **SETTINGS)
    assert (tmp_path / "report.json").exists()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FluxPipeline, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, seed=9, **SETTINGS)
    assert not (tmp_path / "report.json").exists()


def test_what_another_run_drew_is_left_alone(pipe, prompts, embeds, tmp_path):
    """With its report, also where that run is still at work."""

    def evaluate(**options):
        return evaluation.evaluate(
            pipe, tmp_path, prompts=prompts, embeds=embeds, **{**SETTINGS, **options}
        )

    def found():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    evaluate()
    before = found()
    with pytest.raises(UserError, match=r"with seed 0, where 1 is asked for: .*folder.*--force"):
        evaluate(seed=1, replace=False)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is at work here"):
        evaluate(seed=1)
    os.close(handle)
    assert found() == before
    assert evaluate(replace=False).drawn == 0
    # One that is nobody's is not replaced in any case.
    Image.new("RGB", (4, 4)).save(tmp_path / "0003.png")
    before = found()
    with pytest.raises(UserError, match="0003.png carries no flux_jax metadata"):
        evaluate(seed=1)
    assert found() == before


def test_a_picture_that_is_damaged_inside_is_one_line(pipe, prompts, embeds, tmp_path):
    """Its record is whole and so is its end: only decoding finds it."""

    def evaluate():
        return evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, **SETTINGS)

    evaluate()
    path = tmp_path / "0002.png"
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 40
    content[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"0002.png cannot be read as an image: .*; remove it and"):
        evaluate()
    path.unlink()
    assert evaluate().drawn == 1


def test_pictures_are_decoded_once(pipe, prompts, embeds, tmp_path, monkeypatch):
    evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, **SETTINGS)
    decoded = []
    load = PngImagePlugin.PngImageFile.load_end
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load_end", lambda self: (decoded.append(1), load(self))
    )
    evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, **SETTINGS)
    assert len(decoded) == len(prompts)


def _decoded(content: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(content))


def test_pictures_that_show_what_they_should_pass(pipe, prompts, embeds, tmp_path):
    """The files are what is judged: right drawings under the right records score 1."""
    drawn = evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, **SETTINGS)
    claims = [prompt.spec for prompt in prompts]
    scenes, placed = realise(claims, np.random.default_rng(0), keep_held_out_unseen=False)
    assert placed.all()
    for index, image in enumerate(to_uint8(render(scenes))):
        path = tmp_path / evaluation.file_name(index)
        save_png(Image.fromarray(np.asarray(image)), path, drawn.records[index])
    judged = evaluation.evaluate(pipe, tmp_path, prompts=prompts, embeds=embeds, **SETTINGS)
    assert judged.drawn == 0
    assert judged.scores.overall.passed == 1.0
    assert drawn.scores.overall.passed < 1.0


def test_folder_that_cannot_be_made(pipe, prompts, embeds, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder .*file"):
        evaluation.evaluate(pipe, tmp_path / "file", prompts=prompts, embeds=embeds, **SETTINGS)
