"""What a run writes, where a process was killed in the middle of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from ternary.distillation.metrics import Board, Table
from ternary.distillation.run_config import RunConfig
from ternary.distillation.run_log import RunLog


def test_tensorboard_is_on_the_disk_at_once(tmp_path):
    """A killed process closes nothing."""
    board = Board(tmp_path, -1)
    (file,) = tmp_path.iterdir()
    for tell in (
        lambda: board.scalars(1, {"loss": 0.5}),
        lambda: board.image(1, "drawn", Image.new("RGB", (8, 8))),
    ):
        before = file.stat().st_size
        tell()
        assert file.stat().st_size > before
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


def test_a_full_disk_ends_what_is_written(tmp_path):
    """No file may grow beyond a limit, as if the disk was full: neither of the two waits."""
    code = """
import resource, signal, sys
from pathlib import Path
from flux_jax.errors import UserError
from ternary.distillation.metrics import Board
from ternary.distillation.run_config import RunConfig
from ternary.distillation.run_log import METRICS, RunLog
out = Path(sys.argv[1])
log = RunLog(out, RunConfig(), (), done=None, writes=True, progress=False)
board = Board(out / "board", -1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
def told(call):
    try:
        for step in range(1, 500):
            call(step)
    except OSError as error:
        print(error.strerror)
    except UserError as error:
        print(error)
told(lambda step: board.scalars(step, {"loss": 0.5}))
told(lambda step: board.close())
told(lambda step: log.add([{name: step for name in METRICS}]))
told(lambda step: log.close())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    why = "File too large"
    line = f"{tmp_path}: cannot be written: {why}; the run goes on from its last checkpoint"
    assert done.stdout.splitlines() == [why, why, line, line], done.stderr


def test_rows_of_other_digits_are_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text("step,loss\n1,0.5\n\u00b2,0.25\n")
    table = Table(tmp_path / "t.csv", ("step", "loss"), 9)
    assert table.last == {"step": "1", "loss": "0.5"}
    table.close()
