"""Checkpoints of a run where writing them fails, or is interrupted."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from flux_jax.errors import UserError
from ternary.distillation.training_state import StateStore
from tests.jobs import with_devices

PREPARE = """
import os, resource, signal, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from flux_jax.errors import UserError
from ternary.distillation.training_state import StateStore
store = StateStore(Path(sys.argv[1]), keep=2)
key = jax.random.key(0)
state = [jax.random.normal(jax.random.fold_in(key, i), (64, 1024)) for i in range(60)]
store.save(1, [x[:1] for x in state])
store.wait()
"""


def told(code, folder):
    return subprocess.run(
        [sys.executable, "-c", PREPARE + code, str(folder)],
        env=with_devices(1),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path):
    """No file may grow beyond a limit that the second checkpoint exceeds."""
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(2, state)
    store.wait()
except UserError as error:
    print(error)
store.close()
"""
    done = told(code, tmp_path)
    assert done.stderr == ""
    assert done.stdout == (
        f"a checkpoint could not be written to {tmp_path} (File too large); the last good "
        f"checkpoint is step 1, {tmp_path / '1'}\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_a_signal_lets_a_save_that_has_begun_finish(tmp_path, delay):
    code = f"""
def end(number, frame):
    raise SystemExit(143)
signal.signal(signal.SIGTERM, end)
save = store._manager.save
def saved(*given, **named):
    threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return save(*given, **named)
store._manager.save = saved
try:
    store.save(2, state)
    time.sleep(60)
finally:
    store.close()
"""
    done = told(code, tmp_path)
    assert done.returncode == 143
    assert done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_store_that_cannot_be_opened_leaves_reports_as_they_were(tmp_path, monkeypatch):
    def fail(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp, "CheckpointManager", fail)
    hook, level = sys.unraisablehook, logging.getLogger("absl").level
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        StateStore(tmp_path / "checkpoints", keep=1)
    assert sys.unraisablehook is hook
    assert logging.getLogger("absl").level == level


def test_closing_does_not_wait_for_ever(tmp_path, monkeypatch):
    """A disk that does not answer."""
    store = StateStore(tmp_path, keep=1)
    store.save(1, [jnp.zeros(3)])
    store.wait()
    monkeypatch.setattr(store._manager, "close", lambda: time.sleep(60))
    before = time.monotonic()
    store.close(0.2)
    assert time.monotonic() - before < 30


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("a barrier timed out"), RuntimeError),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ConnectionResetError),
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
    ],
)
def test_that_another_process_is_gone_is_no_failed_write(tmp_path, monkeypatch, error, raised):
    """It is told by who joined the processes, in other words."""

    def fail(*_, **__):
        raise error

    store = StateStore(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr(store._manager, "save", fail)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(raised):
        store.save(1, {"a": jnp.zeros(2)})
    store.close()
