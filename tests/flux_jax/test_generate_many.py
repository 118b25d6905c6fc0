"""`python -m flux_jax generate --prompts`: killed and resumed, by one process and by two."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from flux_jax import pipeline, residence
from flux_jax.cli import app
from flux_jax.metadata import read_png
from tests.jobs import finish, start
from tests.small_pipeline import WORDS, small_folder

PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in WORDS[6:10]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments that all runs share."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    model = small_folder(folder / "model")
    return [
        *("generate", "--prompts", str(folder / "prompts.txt"), "--model", str(model)),
        *("--steps", "2", "--dtype", "fp32"),
    ]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def contents(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = run(*inputs, "--out", out)
    assert result.stdout == f"{out}  12 images, 12 drawn now\n"
    assert "12/12" in result.stderr
    return out


def test_every_line_has_its_image(whole):
    assert sorted(contents(whole)) == [f"{line:05d}.png" for line in range(12)]
    for line, prompt in enumerate(PROMPTS):
        record = read_png(whole / f"{line:05d}.png")
        assert (record.prompt, record.seed, record.num_inference_steps) == (prompt, line, 2)


def test_giving_the_command_again_draws_nothing(inputs, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    report = json.loads(run(*inputs, "--out", whole, "--json", "--quiet").stdout)
    assert (report["images"], report["drawn"]) == (12, 0)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    message = run(*inputs, "--out", whole, "--seed", 1, code=2).stderr
    assert "is there with seed 0, where 1 is asked for" in message


def test_several_images_of_each_prompt(inputs, tmp_path):
    (tmp_path / "two.txt").write_text("the cube\n\n the star \n")
    arguments = [*inputs, "--prompts", tmp_path / "two.txt", "--num-images", 2, "--seed", 5]
    run(*arguments, "--out", tmp_path / "out")
    found = {path.name: read_png(path) for path in (tmp_path / "out").iterdir()}
    assert {name: (record.prompt, record.seed) for name, record in found.items()} == {
        "00000-0.png": ("the cube", 5),
        "00000-1.png": ("the cube", 6),
        "00001-0.png": ("the star", 7),
        "00001-1.png": ("the star", 8),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a cube",), "--prompts goes without PROMPT"),
        (("--replay", "image.png"), "--prompts goes without --replay"),
        (("--no-metadata",), "--prompts goes without --no-metadata"),
        (("--prompts", "absent.txt"), "cannot read absent.txt"),
        (("--seed", -1), "seed must be a whole number of at least 0, got -1"),
        (
            ("--out", "image.png"),
            "--prompts draws into a folder: give one with --out, got image.png",
        ),
        (("--num-images", 0), "--num-images must be a whole number of at least 1, got 0"),
        (("--negative", "\udcff", "--true-cfg", 2), "--negative must be text in UTF-8"),
    ],
)
def test_refusals(inputs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(
        pipeline.FluxPipeline, "from_pretrained", lambda *args, **settings: pytest.fail("loaded")
    )
    result = run(*inputs, "--out", tmp_path / "out", *arguments, code=2)
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["/proc", "inputs.txt"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    inputs, tmp_path, monkeypatch, out
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs.txt").write_text("")
    monkeypatch.setattr(
        pipeline.FluxPipeline, "from_pretrained", lambda *args, **settings: pytest.fail("loaded")
    )
    message = run(*inputs, "--out", out, code=2).stderr
    assert "cannot be written" in message or "cannot make the folder" in message


def test_modulation_weights_wait_on_the_host_where_asked(inputs, whole, tmp_path, monkeypatch):
    waiting = []

    def spy(layers, **options):
        waiting.append(layers)
        return residence.HostWeights(layers, **options)

    monkeypatch.setattr(pipeline, "HostWeights", spy)
    run(*inputs, "--out", tmp_path, "--offload-modulation")
    assert len(waiting) == 1
    assert contents(tmp_path) == contents(whole)


def test_a_negative_prompt_without_effect_is_told(inputs, whole, caplog):
    caplog.clear()
    run(*inputs, "--out", whole, "--negative", "a star")
    assert "--negative has no effect without --true-cfg above 1" in caplog.text
    caplog.clear()
    run(*inputs, "--out", whole, "--true-cfg", 2)
    assert "--true-cfg has no effect without --negative" in caplog.text


def test_processes_need_a_file_of_prompts():
    assert (
        "--distributed goes with --prompts" in run("generate", "a", "--distributed", code=2).stderr
    )


@pytest.mark.slow
def test_a_mesh_draws_the_same_images(inputs, whole, tmp_path):
    """Images over data are the same bits, also those that fill up the last batch."""
    run(*inputs, "--out", tmp_path / "out", "--mesh", "data=8")
    assert contents(tmp_path / "out") == contents(whole)
    message = run(*inputs, "--out", tmp_path / "out", "--mesh", "data=16", code=2).stderr
    assert "a mesh of data=16 needs 16 devices, 8 are here" in message


@pytest.mark.long
@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(inputs, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flux_jax", *inputs, "--out", str(out), "--quiet"]
    kept = {}
    for count in (1, 4):
        job = subprocess.Popen(command)
        deadline = time.monotonic() + 240
        while len(contents(out)) < count:
            assert job.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
        job.wait()
        # What is there is whole, and what was there before is not drawn again.
        assert all(contents(whole)[name] == content for name, content in contents(out).items())
        stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        assert kept.items() <= stamps.items()
        kept = stamps
    assert len(kept) < len(PROMPTS)
    run(*inputs, "--out", out)
    assert contents(out) == contents(whole)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.iterdir()}.items()
    assert len(list(out.iterdir())) == len(PROMPTS)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(inputs, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for line in (2, 3, 5, 8, 11):
        (out / f"{line:05d}.png").unlink()
    command = [sys.executable, "-m", "flux_jax", *inputs, "--out", str(out)]
    said = finish(start(command, count=2, devices=1))
    assert contents(out) == contents(whole)
    # One bar, of all images.
    assert "12/12" in said[0]
    assert "12" not in said[1]
