"""Targets appear whole or not at all, and never at the cost of what is there."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from convert import atomic
from flux_jax.errors import UserError


def anything(path: Path) -> bool:
    del path
    return True


def make(target: Path, text: str = "new", **options) -> None:
    with atomic.staged(target, **{"force": False, "replaceable": anything, **options}) as stage:
        stage.mkdir()
        (stage / "file").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b" / "target"
    make(target)
    assert (target / "file").read_text() == "new"
    assert entries(target.parent) == ["target"]


def test_a_file_appears(tmp_path):
    with atomic.staged(tmp_path / "a.safetensors", force=False, replaceable=anything) as stage:
        assert stage.suffix == ".safetensors"
        stage.write_text("x")
        assert not (tmp_path / "a.safetensors").exists()
    assert entries(tmp_path) == ["a.safetensors"]


def test_an_error_leaves_nothing(tmp_path):
    def fail():
        with atomic.staged(tmp_path / "t", force=False, replaceable=anything) as stage:
            stage.mkdir()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert entries(tmp_path) == []


def test_an_existing_target_needs_force(tmp_path):
    make(tmp_path / "t", "old")
    with pytest.raises(UserError, match="t: exists already; --force replaces it"):
        make(tmp_path / "t")
    assert (tmp_path / "t" / "file").read_text() == "old"
    make(tmp_path / "t", force=True)
    assert (tmp_path / "t" / "file").read_text() == "new"
    assert entries(tmp_path) == ["t"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "t").mkdir()
    make(tmp_path / "t")
    assert (tmp_path / "t" / "file").exists()


def test_force_spares_what_is_no_checkpoint(tmp_path):
    make(tmp_path / "t", "old")
    with pytest.raises(UserError, match="no checkpoint that --force would replace"):
        make(tmp_path / "t", force=True, replaceable=lambda path: False)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    with pytest.raises(UserError, match="no checkpoint that --force would replace"):
        make(tmp_path / "link", force=True)
    assert (tmp_path / "t" / "file").read_text() == "old"


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path):
    make(tmp_path / "t", "old")

    def fail():
        with atomic.staged(tmp_path / "t", force=True, replaceable=anything) as stage:
            stage.mkdir()
            assert (tmp_path / "t" / "file").read_text() == "old"
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert (tmp_path / "t" / "file").read_text() == "old"
    assert entries(tmp_path) == ["t"]


def test_without_an_atomic_exchange_the_old_one_is_renamed_away(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    make(tmp_path / "t", "old")
    make(tmp_path / "t", force=True)
    assert (tmp_path / "t" / "file").read_text() == "new"
    assert entries(tmp_path) == ["t"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    def race():
        with atomic.staged(tmp_path / "t", force=False, replaceable=anything) as stage:
            stage.mkdir()
            make(tmp_path / "u", "other")
            (tmp_path / "u").rename(tmp_path / "t")

    with pytest.raises(UserError, match="appeared during the conversion"):
        race()
    assert (tmp_path / "t" / "file").read_text() == "other"
    assert entries(tmp_path) == ["t"]


def test_what_a_dead_run_left_is_removed_and_other_files_are_not(tmp_path):
    (tmp_path / "t.partial-aaaaaaaa" / "t").mkdir(parents=True)
    (tmp_path / "t.partial-aaaaaaaa" / ".lock").touch()
    (tmp_path / "t.partial-bbbbbbbb").mkdir()
    (tmp_path / "t2.partial-cccccccc").mkdir()
    make(tmp_path / "t")
    assert entries(tmp_path) == ["t", "t2.partial-cccccccc"]


def test_a_folder_of_the_users_is_no_leftover(tmp_path):
    for name in ("t.partial-training", "t.partial-aaaaaaaa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    (tmp_path / "t.partial-finished").touch()
    make(tmp_path / "t")
    assert (tmp_path / "t.partial-training" / "file").read_text() == "mine"
    assert len(entries(tmp_path)) == 4


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    """A container's volume: empty, but not to be renamed or removed."""
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "t")
    with pytest.raises(UserError, match="t: is a mount point, .* give a folder in it"):
        make(tmp_path / "t")
    make(tmp_path / "t" / "inside")
    assert entries(tmp_path / "t") == ["inside"]


def test_a_name_with_glob_characters_removes_its_own_leftovers_only(tmp_path):
    (tmp_path / "tx.partial-aaaaaaaa").mkdir()
    (tmp_path / "t[x].partial-aaaaaaaa").mkdir()
    make(tmp_path / "t[x]")
    assert entries(tmp_path) == ["t[x]", "tx.partial-aaaaaaaa"]


def test_a_run_that_is_alive_is_not_disturbed(tmp_path):
    stage = tmp_path / "t.partial-aaaaaaaa"
    stage.mkdir()
    with open(stage / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another conversion is writing to it, in .*aaaaaaaa"):
            make(tmp_path / "t")
    assert stage.exists()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """There a run that is alive looks like a dead one, and is left alone."""

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "t.partial-aaaaaaaa").mkdir()
    (tmp_path / "t.partial-aaaaaaaa" / ".lock").touch()
    make(tmp_path / "t")
    assert entries(tmp_path) == ["t", "t.partial-aaaaaaaa"]


@pytest.mark.parametrize("refused", [stat.S_ISDIR, stat.S_ISREG])
def test_a_disk_that_syncs_no_folders(tmp_path, monkeypatch, refused):
    sync = os.fsync

    def partly(descriptor):
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", partly)
    if refused is stat.S_ISDIR:
        make(tmp_path / "t")
        assert entries(tmp_path) == ["t"]
    else:
        with pytest.raises(UserError, match="cannot be written: Invalid argument"):
            make(tmp_path / "t")
        assert entries(tmp_path) == []


def test_a_killed_process_is_a_dead_run(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from convert import atomic\n"
        "with atomic.staged(Path(sys.argv[1]), force=False, replaceable=bool) as stage:\n"
        "    stage.mkdir()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "t")])
    assert done.returncode == -9
    (left,) = entries(tmp_path)
    assert left.startswith("t.partial-")
    make(tmp_path / "t")
    assert entries(tmp_path) == ["t"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line(tmp_path, code):
    def fail():
        with atomic.staged(tmp_path / "t", force=False, replaceable=anything):
            raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match="t: disk full while writing .*; nothing was kept"):
        fail()
    assert entries(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/t: cannot be written"):
        make(tmp_path / "file" / "t")
