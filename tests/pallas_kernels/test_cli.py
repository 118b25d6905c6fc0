"""`python -m pallas_kernels`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pallas_kernels import cli
from pallas_kernels.checking import Case, Outcome

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_needs_no_jax():
    program = """
import runpy, sys
sys.argv = ["pallas_kernels", "--help"]
try:
    runpy.run_module("pallas_kernels", run_name="__main__")
except SystemExit as end:
    print(end.code, "jax" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "check" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--shape", "4x5"), "--shape must be TOKENSxINPUTSxOUTPUTS, .* got '4x5'"),
        (("bench", "--shape", "99999999x1x99999999"), "at most 10+ values in a matrix, got '9"),
        (("bench", "--shape", "4x0x5"), "got '4x0x5'"),
        (("bench", "--backend", "abacus"), "--backend must be one of mosaic, triton, jax, got 'a"),
        (("bench", "--backend", "mosaic"), "--backend mosaic cannot be used here: it needs an NV"),
        (("check", "--backend", "triton"), "--backend triton cannot be used here: it needs an NV"),
        (("tune",), r"no backend can be used here \(mosaic: it needs an NVIDIA GPU"),
        (("tune", "--backend", "jax"), "--backend jax cannot be used here: it has no tiles"),
        (("tune", "--bits", "4"), "--bits must be 8 or 16, got 4"),
        (
            ("bench", "--out", "absent/bench.json"),
            "--out absent/bench.json: the folder .* not exist",
        ),
        (("check", "--out", "/"), "--out /: is a folder, expected the name of a file"),
        (
            ("bench", "--shape", "8x256x16", "--repeats", "1", "-q", "--out", "/dev/full"),
            "--out /dev/full: cannot be written: No space left on device",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capfd, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    errors = (result.stderr or capfd.readouterr().err).splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert re.search(message, errors[0]), errors[0]


def test_bench_writes_what_it_prints(tmp_path):
    out = tmp_path / "bench.json"
    result = run("bench", "--shape", "8x256x16", "--repeats", "1", "--json", "-q", "-o", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert json.loads(result.stdout) == report
    assert {row["what"] for row in report["rows"]} == {
        "bf16 dot",
        "int8 dot",
        "A16",
        "A8",
        "A8 product",
        "quantize",
        "normalize, quantize",
    }
    assert {(row["m"], row["k"], row["n"]) for row in report["rows"]} == {(8, 256, 16)}
    assert all(row["ms"] > 0 for row in report["rows"])


def test_a_file_that_cannot_be_written_stays_as_it_was(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    out = tmp_path / "bench.json"
    out.write_text("the last one's")
    monkeypatch.setattr("os.replace", full)
    result = run("bench", "--shape", "8x256x16", "--repeats", "1", "-q", "--out", str(out))
    assert result.exit_code == 2
    assert f"--out {out}: cannot be written: No space left on device" in result.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the last one's"]


def test_a_shape_beyond_memory_is_one_line(capfd):
    result = run("bench", "--shape", "99999999999x1x1", "--repeats", "1", "--quiet")
    assert result.exit_code == 1
    errors = (result.stderr or capfd.readouterr().err).splitlines()
    assert len(errors) == 1
    assert re.match("error: the device's memory is full: .*Out of memory", errors[0])


def test_a_negative_seed_is_refused():
    result = run("check", "--backend", "jax", "--seed", "-1")
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_bench_prints_a_table():
    result = run("bench", "--shape", "8x256x16", "--repeats", "1", "--quiet")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["shape", "what"]
    assert any(line.split()[:3] == ["8x256->16", "A16", "jax"] for line in lines)


def outcome(case, name, multiply, seed):
    return Outcome(case=case, backend=name, error=0.5 + seed, repeats=True)


def test_check_runs_plain_jax_and_the_interpreted_kernels(monkeypatch):
    monkeypatch.setattr("pallas_kernels.checking.check", outcome)
    result = run("check", "--json")
    # Of a case with integers, half a bound is too much.
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert {row["backend"] for row in report["cases"]} == {"jax", "mosaic, interpreted"}
    assert not report["passed"]


def test_check_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr("pallas_kernels.checking.CASES", (Case(m=1, n=8, k=256),))
    monkeypatch.setattr("pallas_kernels.checking.check", outcome)
    good = run("check", "--backend", "jax", "--quiet")
    assert good.exit_code == 0
    assert good.stdout.split()[:2] == ["ok", "jax"]
    bad = run("check", "--backend", "jax", "--seed", "1", "--quiet")
    assert bad.exit_code == 1
    assert bad.stdout.split()[:2] == ["WRONG", "jax"]


def test_a_result_that_is_not_finite_is_still_json(monkeypatch):
    """inf is what an element that should be finite and is not gives."""

    def check(case, name, multiply, seed):
        return Outcome(case=case, backend=name, error=float("inf"), repeats=True)

    monkeypatch.setattr("pallas_kernels.checking.CASES", (Case(m=1, n=8, k=256),))
    monkeypatch.setattr("pallas_kernels.checking.check", check)
    result = run("check", "--backend", "jax", "--json")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout, parse_constant=pytest.fail)["cases"]
    assert (row["error"], row["passed"]) == (None, False)
    assert "WRONG" in result.stderr


def test_check_for_real():
    from pallas_kernels import checking

    (run_of_jax,) = cli.check_runs(["jax"])
    name, cases, multiply = run_of_jax
    assert checking.check(cases[0], name, multiply).passed


@pytest.fixture
def _mosaic_is_here(monkeypatch):
    from pallas_kernels import bench

    reasons = {"mosaic": None, "triton": "not here", "jax": None}
    monkeypatch.setattr(bench, "backends_here", lambda: dict(reasons))


@pytest.mark.usefixtures("_mosaic_is_here")
def test_tune_extends_the_table(monkeypatch, tmp_path):
    from pallas_kernels import tile_table, tuning
    from pallas_kernels.tiles import FewTile

    def search(backend, problem, device, *, repeats):
        yield tuning.Trial(tile=FewTile(tokens=8), ms=2.0)
        yield tuning.Trial(tile=FewTile(tokens=8, stages=3), ms=1.0)
        yield tuning.Trial(tile=FewTile(tokens=8, stages=9), ms=None, failure="too large")

    monkeypatch.setattr(tuning, "search", search)
    table = tmp_path / "table.json"
    result = run("tune", "--shape", "1x256x8", "--bits", "8", "--table", str(table), "--json", "-q")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["failures"]) == 1
    (entry,) = tile_table.read_entries(table)
    assert entry.tile == FewTile(tokens=8, stages=3)
    assert report["entries"] == [entry.to_json()]


@pytest.mark.usefixtures("_mosaic_is_here")
def test_tune_keeps_what_it_found_before_it_was_stopped(monkeypatch, tmp_path):
    from pallas_kernels import tile_table, tuning
    from pallas_kernels.tiles import FewTile

    def search(backend, problem, device, *, repeats):
        if problem.activation_bits == 16:
            raise KeyboardInterrupt
        yield tuning.Trial(tile=FewTile(tokens=8), ms=2.0)

    monkeypatch.setattr(tuning, "search", search)
    table = tmp_path / "table.json"
    assert run("tune", "--shape", "1x256x8", "--table", str(table), "-q").exit_code != 0
    (entry,) = tile_table.read_entries(table)
    assert entry.problem.activation_bits == 8


@pytest.mark.usefixtures("_mosaic_is_here")
def test_tune_refuses_what_is_no_table_before_it_searches(monkeypatch, tmp_path):
    from pallas_kernels import tuning

    monkeypatch.setattr(tuning, "search", None)
    (tmp_path / "notes.json").write_text("{}")
    result = run("tune", "--shape", "1x256x8", "--table", str(tmp_path / "notes.json"))
    assert result.exit_code == 2
    assert "notes.json: expected a table of tiles" in result.stderr
    assert (tmp_path / "notes.json").read_text() == "{}"


@pytest.mark.usefixtures("_mosaic_is_here")
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("/proc/x/t.json", "cannot be written: "),
        ("/dev/null/t.json", "cannot be written: "),
        (f"{'t' * 300}.json", "cannot be written: File name too long"),
        ("/", "is a folder, expected the name of a file"),
    ],
)
def test_tune_refuses_a_table_that_cannot_be_written_before_it_searches(
    monkeypatch, table, message
):
    from pallas_kernels import tuning

    monkeypatch.setattr(tuning, "search", None)
    result = run("tune", "--shape", "1x256x8", "--table", table)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --table {table}: {message}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("_mosaic_is_here")
def test_tune_makes_the_folder_of_its_table(monkeypatch, tmp_path):
    from pallas_kernels import tile_table, tuning
    from pallas_kernels.tiles import FewTile

    def search(backend, problem, device, *, repeats):
        yield tuning.Trial(tile=FewTile(tokens=8), ms=2.0)

    monkeypatch.setattr(tuning, "search", search)
    table = tmp_path / "new" / "tables" / "gpu.json"
    assert run("tune", "--shape", "1x256x8", "--table", str(table), "-q").exit_code == 0
    assert len(tile_table.read_entries(table)) == 2


@pytest.mark.usefixtures("_mosaic_is_here")
def test_tune_fails_where_no_tile_of_a_product_runs(monkeypatch, tmp_path):
    """What was found for the others is kept."""
    from pallas_kernels import tile_table, tuning
    from pallas_kernels.tiles import FewTile

    def search(backend, problem, device, *, repeats):
        if problem.activation_bits == 8:
            yield tuning.Trial(tile=FewTile(tokens=8), ms=None, failure="too large")
        else:
            yield tuning.Trial(tile=FewTile(tokens=8), ms=2.0)

    monkeypatch.setattr(tuning, "search", search)
    table = tmp_path / "table.json"
    result = run("tune", "--shape", "1x256x8", "--table", str(table), "--json", "-q")
    assert result.exit_code == 1
    assert result.stderr == "error: no tile could run: 1x256x8 with 8 bits on mosaic\n"
    report = json.loads(result.stdout)
    assert (len(report["entries"]), len(report["failures"])) == (1, 1)
    assert [entry.problem.activation_bits for entry in tile_table.read_entries(table)] == [16]


def test_the_options_of_tune_are_its_own():
    shown = run("tune", "--help").stdout
    assert "mosaic or triton" in shown
    assert "jax;" not in shown
    assert "on a CPU" not in shown
