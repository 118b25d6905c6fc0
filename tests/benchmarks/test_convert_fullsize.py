"""The conversion benchmark, on the tiny model."""

import shutil

import pytest

from benchmarks import convert_fullsize
from benchmarks.common import read_result


def test_figures_are_medians_and_the_highest_peak():
    measured = {
        "cp": [2.0, 8.0, 4.0],
        "cp_sync": [5.0, 9.0, 6.0],
        "convert": [3.0, 1.0, 2.0],
        "peak": [1e9, 3e9, 2e9],
    }
    converted, copied = convert_fullsize.result_figures(measured, 24_000_000_000, 3)
    assert {name: figure.value for name, figure in converted.items()} == {
        "size_gb": 24.0,
        "seconds": 2.0,
        "synced_seconds": 2.0,
        "ratio": 0.5,
        "peak_gb": 3.0,
    }
    assert {name: figure.value for name, figure in copied.items()} == {
        "seconds": 4.0,
        "synced_seconds": 6.0,
    }
    assert "median of 3, 1 to 3 s" in converted["seconds"].note


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cp") is None, reason="there is no cp")
def test_tiny_run_writes_a_result(tmp_path, monkeypatch):
    """In a folder that is named from where one stands."""
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path.relative_to(tmp_path) / "disk"
    convert_fullsize.main(folder=folder, rounds=1, disk="a disk", tiny=True, out=tmp_path)
    result = read_result(tmp_path / "convert_fullsize_tiny_a-disk.json")
    assert 0.02 < result.figures["size_gb"].value < 0.04
    assert result.figures["peak_gb"].value > 0.05
    assert not list((tmp_path / "disk").iterdir())
