"""A run's folder: one run at a time, and files that are there whole or not at all."""

from __future__ import annotations

import os

import pytest

from flux_jax.errors import UserError
from ternary.storage.run_folder import claimed, write_whole, writing


def test_another_run_is_kept_out_until_the_first_is_done(tmp_path):
    with claimed(tmp_path), pytest.raises(UserError, match="another run is at work here"):
        with claimed(tmp_path):
            pass
    with claimed(tmp_path):
        pass


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none: cannot be written: No such file"):
        with claimed(tmp_path / "none"):
            pass


def test_a_failed_write_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"b.txt: cannot be written: No such file .*; a is kept"):
        with writing(tmp_path / "b.txt", "; a is kept"):
            write_whole(tmp_path / "none" / "b.txt", "b")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "one\n")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two\n")
    assert path.read_text() == "one\n"
    assert list(tmp_path.iterdir()) == [path]
