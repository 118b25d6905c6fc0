"""A run's folder belongs to one task: prompts, teacher, start and held-out prompts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from flux_jax.errors import UserError
from flux_jax.sharding import MeshConfig, make_mesh
from ternary.config import QuantConfig
from ternary.distillation.run_config import RunConfig
from ternary.distillation.task import (
    CHECKPOINTS,
    Prompts,
    Task,
    calibrated_start,
    open_folder,
)
from ternary.policy import Policy
from tests.ternary.latents_folder import write_latents

TEXTS = Prompts(train=["a red circle", "a star"], held_out=["a ring"], judged=[])
# Of its weights.
TEACHER = 0xC0FFEE


@pytest.fixture
def begun(tmp_path):
    """Makes a run's folder, and a checkpoint in it: from then on its settings are its own."""

    def begin(task, config):
        out = tmp_path / "run"
        open_folder(out, task, config, TEXTS, TEACHER)
        (out / CHECKPOINTS / "500").mkdir(parents=True)
        return out

    return begin


def test_a_folder_goes_on_with_its_own_settings_alone(begun):
    task = Task(teacher="tiny", prompts=Path("prompts.txt"))
    out = begun(task, RunConfig())
    open_folder(out, task, RunConfig(mesh=MeshConfig(fsdp=2)), TEXTS, TEACHER)
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed: 0 -> 1\)"):
        open_folder(out, task, RunConfig(seed=1), TEXTS, TEACHER)


def test_settings_count_from_the_first_checkpoint_on(tmp_path):
    """A start that came to nothing does not stand in the way of the next."""
    task, out = Task(teacher="tiny", prompts=Path("prompts.txt")), tmp_path / "run"
    open_folder(out, task, RunConfig(seed=1), TEXTS, TEACHER)
    # Neither is one that was being written when the run was killed.
    (out / CHECKPOINTS / "500.orbax-checkpoint-tmp-0").mkdir(parents=True)
    open_folder(out, task, RunConfig(seed=2), TEXTS, TEACHER)
    assert yaml.safe_load((out / "run.yaml").read_text())["seed"] == 2


def test_a_folder_goes_on_however_its_inputs_are_spelled(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "start").mkdir()
    (tmp_path / "link").symlink_to("teacher")
    task = Task(
        teacher="teacher", prompts=Path("prompts.txt"), start=Path("start"), held_out="held.txt"
    )
    out = begun(task, RunConfig())
    for change in (
        {"teacher": str(tmp_path / "teacher")},
        {"teacher": "./link/"},
        # The texts are the same.
        {"prompts": tmp_path / "prompts.txt"},
        {"held_out": "copy.txt"},
        {"start": tmp_path / "start"},
        # What it began with has no say in what follows.
        {"start": None},
    ):
        open_folder(out, dataclasses.replace(task, **change), RunConfig(), TEXTS, TEACHER)
    other = dataclasses.replace(task, start=Path("other"))
    with pytest.raises(UserError, match=f"start: {tmp_path}/start -> {tmp_path}/other"):
        open_folder(out, other, RunConfig(), TEXTS, TEACHER)


def test_a_folder_goes_on_from_another_working_folder(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("teacher", "start", "elsewhere"):
        (tmp_path / name).mkdir()
    task = Task(teacher="~/teacher", prompts=Path("prompts.txt"), start="start")
    out = begun(task, RunConfig())
    settings = yaml.safe_load((out / "run.yaml").read_text())
    assert settings["teacher"] == str(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for start in ("../start", "~/start"):
        open_folder(out, dataclasses.replace(task, start=start), RunConfig(), TEXTS, TEACHER)
    # The start is behind it, and need not be kept for the same command.
    (tmp_path / "start").rmdir()
    open_folder(out, dataclasses.replace(task, start="../start"), RunConfig(), TEXTS, TEACHER)


def test_a_folder_of_pictures_is_not_the_shipped_teacher(tmp_path, monkeypatch):
    """What is read is the model that ships; its name is what is noted, for `report`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    task = Task(teacher="tiny", prompts=Path("prompts.txt"))
    open_folder(tmp_path / "run", task, RunConfig(), TEXTS, TEACHER)
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["teacher"] == "tiny"


def test_a_folder_goes_on_with_its_own_teacher_alone(begun, tmp_path):
    """The same weights wherever they lie, not others in their place."""
    (tmp_path / "teacher").mkdir()
    task = Task(teacher=str(tmp_path / "teacher"), prompts=Path("prompts.txt"))
    out = begun(task, RunConfig())
    moved = dataclasses.replace(task, teacher=str(tmp_path / "moved"))
    (tmp_path / "teacher").rename(moved.teacher)
    open_folder(out, moved, RunConfig(), TEXTS, TEACHER)
    with pytest.raises(UserError, match=r"\(teacher_crc32: 00c0ffee -> 00000bad\)"):
        open_folder(out, task, RunConfig(), TEXTS, 0xBAD)


@pytest.mark.parametrize("name", ["teacher_crc32", "prompts_crc32"])
def test_a_folder_of_an_earlier_version_is_one_line(begun, name):
    task = Task(teacher="tiny", prompts=Path("prompts.txt"))
    path = begun(task, RunConfig()) / "run.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(name)))
    with pytest.raises(UserError, match=f"has no {name}: it was written by an earlier version"):
        open_folder(path.parent, task, RunConfig(), TEXTS, TEACHER)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_folder(
            tmp_path, Task(teacher="tiny", prompts=Path("p.txt")), RunConfig(), TEXTS, TEACHER
        )
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", [".run.yaml.partial", ".run.yaml.partial-1"])
def test_killed_while_it_wrote_its_settings_a_run_begins(tmp_path, name):
    (tmp_path / name).write_text("teach")
    open_folder(tmp_path, Task(teacher="tiny", prompts=Path("p.txt")), RunConfig(), TEXTS, TEACHER)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_folder_goes_on_with_its_own_texts_alone(begun):
    """The file has its name still, but a line more: every row would be another prompt."""
    task = Task(teacher="tiny", prompts=Path("prompts.txt"))
    out = begun(task, RunConfig())
    longer = dataclasses.replace(TEXTS, train=["a cube", *TEXTS.train])
    with pytest.raises(UserError, match="prompts_crc32: .* -> "):
        open_folder(out, task, RunConfig(), longer, TEACHER)


@pytest.mark.parametrize("content", [b"", b"- a list", b"\xff", b"a: [", b"3", b"seed: 2024-99-99"])
def test_settings_that_are_damaged_are_no_traceback(begun, content):
    task = Task(teacher="tiny", prompts=Path("p.txt"))
    out = begun(task, RunConfig())
    (out / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match="run.yaml is damaged: restore it, or name another folder"):
        open_folder(out, task, RunConfig(), TEXTS, TEACHER)


LATENTS = {
    "embedders": {"img_in.weight": np.arange(8, dtype=np.float32).reshape(4, 2)},
    "final_layer": {"final_layer.linear.bias": np.arange(3, dtype=np.float32)},
}


def shapes(**changed):
    """Of the student's parameters, one of them split over two devices."""
    mesh = make_mesh(fsdp=2)
    places = {"img_in.weight": PartitionSpec("fsdp", None)}
    found = {name: v.shape for part in LATENTS.values() for name, v in part.items()} | changed
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, places.get(name, PartitionSpec()))
        )
        for name, shape in found.items()
    }


def test_a_calibration_is_the_start(tmp_path):
    quant, policy = QuantConfig(granularity="group128"), Policy(include=("final_layer.*",))
    folder = write_latents(tmp_path / "latents", LATENTS, quant, policy)
    config = RunConfig(quant=quant, policy=policy)
    wanted = shapes()
    found = calibrated_start(folder, wanted, config)
    # Not one file of it stays open.
    handles = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    assert not [handle for handle in handles if handle.startswith(str(folder))]
    assert found.keys() == wanted.keys()
    for part in LATENTS.values():
        for name, value in part.items():
            np.testing.assert_array_equal(np.asarray(found[name]), value)
            assert found[name].sharding == wanted[name].sharding
    other = dataclasses.replace(config, quant=QuantConfig(granularity="tensor"))
    message = r"calibrated for another student \(quant.granularity: group128 -> tensor\)"
    with pytest.raises(UserError, match=message):
        calibrated_start(folder, wanted, other)
    with pytest.raises(UserError, match="for another transformer than the teacher's"):
        calibrated_start(folder, shapes(**{"img_in.weight": (4, 3)}), config)
