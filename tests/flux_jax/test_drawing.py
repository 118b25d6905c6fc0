"""Many images into a folder: the same ones however the run is cut up, and none lost or redrawn."""

from __future__ import annotations

import fcntl
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from flux_jax import drawing
from flux_jax.configs import SchedulerConfig
from flux_jax.drawing import Job, draw
from flux_jax.errors import UserError
from flux_jax.metadata import read_png
from flux_jax.processes import Processes
from tests.small_pipeline import small_pipeline

PROMPTS = ["a red circle", "the cube", "a red circle", "a blue star", "the green square"]
SETTINGS = {"num_inference_steps": 1}


@pytest.fixture(scope="module")
def jobs():
    return [
        Job(prompt=prompt, seed=7 + i, file=f"{i % 2}/{i}.png") for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def whole(pipe, jobs, tmp_path_factory):
    """All images, drawn in one go."""
    out = tmp_path_factory.mktemp("whole")
    assert draw(pipe, jobs, out, settings=SETTINGS, progress=False) == len(jobs)
    return out


def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}


def test_images_are_those_of_a_call(pipe, jobs, whole):
    assert set(contents(whole)) == {job.file for job in jobs}
    for job in jobs:
        expected = pipe(job.prompt, seed=job.seed, progress=False, **SETTINGS)
        with Image.open(whole / job.file) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.images[0]))
        record = read_png(whole / job.file)
        assert (record.prompt, record.seed) == (job.prompt, job.seed)
        assert record.fingerprint == pipe.fingerprint()


def test_what_is_there_is_left_alone(pipe, jobs, whole, tmp_path, monkeypatch, capsys):
    """Any part of the images first, any chunk of prompts: the same bytes in the end."""
    monkeypatch.setattr(drawing, "ENCODED_TOGETHER", 2)
    assert draw(pipe, jobs[3:4], tmp_path, settings=SETTINGS, progress=False) == 1
    before = (tmp_path / jobs[3].file).stat()
    # As a killed run leaves it: an image that was being written, and one cut off by a crash.
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / f".0.png.partial-{dead()}").write_bytes(b"half")
    (tmp_path / "0" / "2.png").write_bytes((whole / "0" / "2.png").read_bytes()[:-20])
    assert draw(pipe, jobs, tmp_path, settings=SETTINGS) == 4
    assert "5/5" in capsys.readouterr().err
    assert (tmp_path / jobs[3].file).stat().st_mtime_ns == before.st_mtime_ns
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.rglob(".*"))
    assert draw(pipe, jobs, tmp_path, settings=SETTINGS, progress=False) == 0


def test_an_image_of_another_scheduler_or_attention_is_refused(jobs, tmp_path):
    pipe = small_pipeline()
    draw(pipe, jobs[:1], tmp_path, settings=SETTINGS, progress=False)
    pipe.use_kernels(attention="xla_fp8")
    with pytest.raises(UserError, match="is there with attention None, where 'xla_fp8' is asked"):
        draw(pipe, jobs[:1], tmp_path, settings=SETTINGS, progress=False)
    pipe.use_kernels()
    pipe.scheduler = SchedulerConfig(shift=2.0, use_dynamic_shifting=False)
    with pytest.raises(UserError, match="is there with fingerprint"):
        draw(pipe, jobs[:1], tmp_path, settings=SETTINGS, progress=False)


def test_an_image_of_other_settings_is_refused_or_replaced(pipe, jobs, tmp_path):
    draw(pipe, jobs[:2], tmp_path, settings=SETTINGS, progress=False)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="0.png is there with num_inference_steps 1, where 2 is"):
        draw(pipe, jobs[:2], tmp_path, settings={"num_inference_steps": 2}, progress=False)
    assert contents(tmp_path) == before
    settings = {"num_inference_steps": 2, "negative_prompt": "a star", "true_cfg_scale": 2.0}
    for expected in (2, 0):
        drawn = draw(pipe, jobs[:2], tmp_path, settings=settings, replace=True, progress=False)
        assert drawn == expected
    assert read_png(tmp_path / jobs[1].file).negative_prompt == "a star"


def test_a_picture_of_another_program_is_not_written_over(pipe, jobs, tmp_path):
    (tmp_path / "0").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "0" / "0.png")
    for replace in (False, True):
        with pytest.raises(UserError, match="0.png carries no flux_jax metadata"):
            draw(pipe, jobs, tmp_path, settings=SETTINGS, replace=replace, progress=False)


def test_what_is_no_picture_is_not_written_over(pipe, jobs, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "0.png").write_text("precious")
    with pytest.raises(UserError, match="0.png cannot be read as an image"):
        draw(pipe, jobs, tmp_path, settings=SETTINGS, progress=False)
    assert (tmp_path / "0" / "0.png").read_text() == "precious"


def test_processes_share_the_images(pipe, jobs, whole, tmp_path, monkeypatch):
    """Each draws its part of what is missing; together they draw all of it."""
    draw(pipe, jobs[1:2], tmp_path, settings=SETTINGS, progress=False)
    monkeypatch.setattr(Processes, "wait", lambda self, what: None)
    told = []
    monkeypatch.setattr(
        Processes,
        "from_first",
        lambda self, value: told[0] if told else told.append(value) or value,
    )
    found = []
    for index in (0, 1):
        processes = Processes(index=index, count=2)
        drawn = draw(pipe, jobs, tmp_path, settings=SETTINGS, progress=False, processes=processes)
        assert drawn == 4
        found.append(set(contents(tmp_path)))
    assert found[0] == {jobs[i].file for i in (0, 1, 3)}
    assert contents(tmp_path) == contents(whole)


def test_one_run_at_a_time(pipe, jobs, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=f"{tmp_path}: another run is at work here"):
        draw(pipe, jobs, tmp_path, settings=SETTINGS, progress=False)
    os.close(handle)
    assert draw(pipe, jobs[:1], tmp_path, settings=SETTINGS, progress=False) == 1


def test_the_bar_looks_at_few_files(jobs, tmp_path, monkeypatch):
    """At the next ones of each process, however many are missing."""
    looks = []
    stamp = drawing._stamp
    monkeypatch.setattr(drawing, "_stamp", lambda path: looks.append(path) or stamp(path))
    many = [Job(prompt="a", seed=i, file=f"{i}.png") for i in range(50)]
    shares = [many[::2], many[1::2]]
    shown = drawing._Progress(shares, tmp_path, 60, disable=False)
    for done, job in enumerate(many, 1):
        (tmp_path / job.file).touch()
        shown.look()
        assert shown._bar.n == 10 + done
    shown.close()
    # Before, when it comes, and the next one of each process at every look.
    assert len(looks) <= 2 * 50 + 2 * 50


def test_an_error_stands_on_a_line_of_its_own(pipe, jobs, tmp_path, capsys):
    def fail(prompts):
        raise UserError("no")

    with pytest.raises(UserError) as error:
        draw(pipe, jobs, tmp_path, settings=SETTINGS, encode=fail)
    assert str(error.value) == "no"
    # Now, and not when nobody holds the bar any more.
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("a.jpg", UserError, "must end in .png"),
        ("0/0.png", ValueError, "a file each, got '0/0.png'"),
    ],
)
def test_files_that_cannot_be(pipe, jobs, tmp_path, file, error, message):
    with pytest.raises(error, match=message):
        draw(pipe, [jobs[0], Job(prompt="a", seed=0, file=file)], tmp_path, progress=False)


def test_a_folder_that_cannot_be_written_to(pipe, jobs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        draw(pipe, jobs, tmp_path / "file", settings=SETTINGS, progress=False)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "0.png").mkdir()
    with pytest.raises(UserError, match="0.png: cannot be written"):
        draw(pipe, jobs, tmp_path, settings=SETTINGS, progress=False)
