"""A run's folder belongs to one task: prompts, teacher, start and held-out prompts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flux_jax.errors import UserError
from flux_jax.sharding import MeshConfig, make_mesh
from ternary.config import QuantConfig
from ternary.distillation.run_config import RunConfig
from ternary.distillation.task import Prompts, Task, calibrated_start, open_folder
from ternary.policy import Policy
from tests.ternary.latents_folder import write_latents

TEXTS = Prompts(train=["a red circle", "a star"], held_out=["a ring"], judged=[])


@pytest.mark.parametrize("before", [None, "held.txt", "composition"])
def test_a_folder_goes_on_with_its_own_held_out_prompts_alone(tmp_path, before):
    task = Task(teacher="tiny", prompts=Path("prompts.txt"), held_out=before)
    config = RunConfig()
    open_folder(tmp_path / "run", task, config, TEXTS)
    open_folder(tmp_path / "run", task, dataclasses.replace(config, mesh=MeshConfig(fsdp=2)), TEXTS)
    other = dataclasses.replace(task, held_out="other.txt")
    with pytest.raises(UserError, match=f"held_out_prompts: {before} -> other.txt"):
        open_folder(tmp_path / "run", other, config, TEXTS)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_folder(tmp_path, Task(teacher="tiny", prompts=Path("p.txt")), RunConfig(), TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_goes_on_with_its_own_texts_alone(tmp_path):
    """The file has its name still, but a line more: every row would be another prompt."""
    task = Task(teacher="tiny", prompts=Path("prompts.txt"))
    open_folder(tmp_path / "run", task, RunConfig(), TEXTS)
    longer = dataclasses.replace(TEXTS, train=["a cube", *TEXTS.train])
    with pytest.raises(UserError, match="prompts_crc32: .* -> "):
        open_folder(tmp_path / "run", task, RunConfig(), longer)
    # A run that was begun before its texts had a name goes on.
    path = tmp_path / "run" / "run.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("prompts_crc32")))
    open_folder(tmp_path / "run", task, RunConfig(), longer)


@pytest.mark.parametrize("content", [b"", b"- a list", b"\xff", b"a: [", b"3"])
def test_settings_that_are_damaged_are_no_traceback(tmp_path, content):
    task = Task(teacher="tiny", prompts=Path("p.txt"))
    open_folder(tmp_path / "run", task, RunConfig(), TEXTS)
    (tmp_path / "run" / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match="run.yaml is damaged: restore it, or name another folder"):
        open_folder(tmp_path / "run", task, RunConfig(), TEXTS)


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
