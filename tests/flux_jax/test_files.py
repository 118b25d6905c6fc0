"""Files as people have them: marks, ends of lines, what is no text; and files written whole."""

from __future__ import annotations

import os
import subprocess

import pytest

from flux_jax.errors import UserError
from flux_jax.files import (
    claimed,
    clear_partials,
    make_folder,
    partial_paths,
    read_text,
    write_whole,
    writing,
)
from flux_jax.prompt_file import read_prompts


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "a cat\na dog\u2028asleep\n",
        "a cat\r\na dog\u2028asleep\r\n",
        "\ufeffa cat\r\na dog\u2028asleep",
        "\n  a cat \n\n a dog\u2028asleep\t\n \n",
    ],
    ids=["unix", "windows", "mark", "blanks"],
)
def test_a_prompt_a_line(tmp_path, content):
    """A line ends where an editor ends it, not at a separator within a caption."""
    path = write(tmp_path / "prompts.txt", content.encode())
    assert read_prompts(path) == ["a cat", "a dog\u2028asleep"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a cat\na d\xffg", "prompts.txt, line 2: is not UTF-8 text"),
        (b"a cat\n\na\0dog", "prompts.txt, line 3: is not UTF-8 text"),
        (b"", "prompts.txt is empty; it must hold one prompt a line"),
        (b" \r\n\n", "prompts.txt is empty; it must hold one prompt a line"),
    ],
)
def test_what_is_no_file_of_prompts(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / "prompts.txt", content))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.txt: No such file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="cannot read .*: Is a directory"):
        read_text(tmp_path)


def test_a_file_is_written_whole_or_left(tmp_path):
    path = tmp_path / "file"
    # It may be another host's, whose process has our number.
    other = tmp_path / f".file.partial-{os.getpid()}"
    other.write_bytes(b"of a process that is at work")
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be written: Is a directory"):
        write_whole(tmp_path / "folder", b"three")
    with pytest.raises(UserError, match="none/file: cannot be written: No such file"):
        write_whole(tmp_path / "none" / "file", b"three")
    assert other.read_bytes() == b"of a process that is at work"
    assert sorted(found.name for found in tmp_path.iterdir()) == [other.name, "file", "folder"]


@pytest.mark.parametrize("number", [1, os.getpid()], ids=["processes", "threads, or hosts"])
def test_two_write_a_file_at_a_time(tmp_path, monkeypatch, number):
    """Each has a name of its own for the half: none is renamed before it is whole."""
    path, sync = tmp_path / "file", os.fsync

    def other(handle):
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "getpid", lambda: number)
        write_whole(path, b"of the other")
        assert path.read_bytes() == b"of the other"
        sync(handle)

    monkeypatch.setattr(os, "fsync", other)
    write_whole(path, b"one")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_is_on_the_disk_too(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def watched(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(tmp_path / "file", b"one")
    assert synced[-1] == str(tmp_path)
    # As any file of this user's.
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, kind):
    def interrupted(handle):
        raise kind

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(kind):
        write_whole(tmp_path / "file", b"one")
    assert not list(tmp_path.iterdir())


def test_what_the_dead_left_is_cleared(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = (".a.png.partial", f".a.png.partial-{os.getpid()}", ".a.partial-x", "a.partial-1")
    left = f".a.png.partial-{dead.pid}"
    # What an earlier run in a container left, whose process had our number.
    again = f".b.png.partial-{os.getpid()}-0123abcd"
    for name in (*names, left, f".b.png.partial-{dead.pid}-0123abcd", again):
        (tmp_path / name).touch()
    found = partial_paths(tmp_path / "a.png")
    assert {path.name for path in found} == {*names[:2], left}
    clear_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_folders(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder .*file: File exists"):
        make_folder(tmp_path / "file")


def test_another_run_is_kept_out_until_the_first_is_done(tmp_path):
    with claimed(tmp_path), pytest.raises(UserError, match="another run is at work here"):
        with claimed(tmp_path):
            pass
    with claimed(tmp_path):
        pass
    with pytest.raises(UserError, match="none: cannot be written: No such file"):
        with claimed(tmp_path / "none"):
            pass


def test_a_failed_write_says_what_is_left(tmp_path):
    with pytest.raises(UserError, match=r"b.txt: cannot be written: No such file .*; a is kept"):
        write_whole(tmp_path / "none" / "b.txt", b"b", "; a is kept")
    with pytest.raises(UserError, match=r"b: cannot be written: No such file .*; a is kept"):
        with writing(tmp_path / "b", "; a is kept"):
            (tmp_path / "none" / "b").touch()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, b"one")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a.txt: cannot be written: No space left"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
