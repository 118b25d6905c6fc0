"""What a run writes, where a process was killed in the middle of it."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from ternary.distillation.metrics import Board
from ternary.distillation.run_config import RunConfig
from ternary.distillation.run_log import RunLog


def test_tensorboard_is_on_the_disk_soon(tmp_path):
    """A killed process closes nothing."""
    board = Board(tmp_path, -1)
    (file,) = tmp_path.iterdir()
    for tell in (
        lambda: board.scalars(1, {"loss": 0.5}),
        lambda: board.image(1, "drawn", Image.new("RGB", (8, 8))),
    ):
        before = file.stat().st_size
        tell()
        deadline = time.monotonic() + 60
        while file.stat().st_size <= before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    board.close()


@pytest.mark.parametrize(
    ("done", "left"), [(None, set()), (0, {0}), (300, {0, 300}), (600, {0, 300, 600})]
)
def test_pictures_of_steps_that_are_taken_again_are_gone(tmp_path, done, left):
    """Before the first checkpoint a run may be begun anew with other settings: all of them."""
    samples = tmp_path / "samples"
    samples.mkdir()
    for step in (0, 300, 600):
        for suffix in ("png", "json"):
            (samples / f"step_{step:06d}.{suffix}").write_text("")
    (samples / "mine.txt").write_text("")
    RunLog(tmp_path, RunConfig(), (), done=done, writes=True, progress=False).close()
    names = {f"step_{step:06d}.{suffix}" for step in left for suffix in ("png", "json")}
    assert {path.name for path in samples.iterdir()} == {*names, "mine.txt"}
