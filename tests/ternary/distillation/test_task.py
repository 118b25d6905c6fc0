"""A run's folder belongs to one task: prompts, teacher, start and held-out prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flux_jax.errors import UserError
from flux_jax.sharding import MeshConfig
from ternary.distillation.run_config import RunConfig
from ternary.distillation.task import Task, open_folder


@pytest.mark.parametrize("before", [None, "held.txt", "composition"])
def test_a_folder_goes_on_with_its_own_held_out_prompts_alone(tmp_path, before):
    task = Task(teacher="tiny", prompts=Path("prompts.txt"), held_out=before)
    config = RunConfig()
    open_folder(tmp_path / "run", task, config)
    open_folder(tmp_path / "run", task, dataclasses.replace(config, mesh=MeshConfig(fsdp=2)))
    other = dataclasses.replace(task, held_out="other.txt")
    with pytest.raises(UserError, match=f"held_out_prompts: {before} -> other.txt"):
        open_folder(tmp_path / "run", other, config)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_folder(tmp_path, Task(teacher="tiny", prompts=Path("p.txt")), RunConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
