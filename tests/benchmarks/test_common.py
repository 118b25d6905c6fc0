import json

import pytest

from benchmarks.common import (
    Figure,
    Peer,
    Result,
    ResultError,
    found_by,
    median_seconds,
    read_result,
    run,
)
from benchmarks.machine import command_line, package_versions
from flux_jax.errors import UserError


def make_result(**changes):
    fields = {
        "benchmark": "transformer_step",
        "device": "NVIDIA H200 (SXM)",
        "figures": {"step_ms": Figure(value=118.25, unit="ms", note="median")},
        "peers": {
            "diffusers, eager": Peer(
                versions={"torch": "2.13.0"},
                figures={"step_ms": Figure(value=171.5, unit="ms")},
            )
        },
    }
    return Result(**{**fields, **changes})


def test_result_file_round_trip(tmp_path):
    result = make_result()
    path = result.write(tmp_path / "made")
    assert path.name == "transformer_step_nvidia-h200-sxm.json"
    assert read_result(path) == result


def test_result_describes_the_run():
    result = make_result()
    assert result.versions["python"].count(".") == 2
    assert result.hardware["cpu_cores"] >= 1
    assert result.commit


def test_written_floats_are_rounded(tmp_path):
    path = make_result(figures={"x": Figure(value=1 / 3, unit="s")}).write(tmp_path)
    assert json.loads(path.read_text())["figures"]["x"]["value"] == 0.333333


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": float("nan"), "unit": "ms"}, "must be finite, got nan"),
        ({"value": "3", "unit": "ms"}, "must be a number, got '3'"),
        ({"value": True, "unit": "ms"}, "must be a number, got True"),
        ({"value": 3.0, "unit": ""}, "needs a unit"),
    ],
)
def test_figure_refuses(fields, message):
    with pytest.raises(ResultError, match=message):
        Figure(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=0), 'expected "schema": 1'),
        (lambda data: data.pop("commit"), r"missing fields \['commit'\]"),
        (lambda data: data.update(colour=1), r"unknown fields \['colour'\]"),
        (lambda data: data["figures"]["step_ms"].pop("unit"), "figure or a peer is malformed"),
        (lambda data: data["peers"].update(x={}), "figure or a peer is malformed"),
    ],
)
def test_read_result_refuses(tmp_path, change, message):
    path = make_result().write(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match=message):
        read_result(path)


def test_read_result_refuses_what_is_not_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ResultError, match=r"x\.json: not a JSON file"):
        read_result(path)


def test_a_result_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ResultError, match=r"x\.json: cannot be read \(No such file"):
        read_result(tmp_path / "x.json")


def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys):
    def main() -> None:
        raise UserError("--tokens must be a square number, got 3")

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --tokens must be a square number, got 3\n"


def test_a_pattern_chooses_names():
    names = ["loop bf16", "loop ternary", "floor"]
    assert found_by(None, names) == names
    assert found_by("loop", names) == names[:2]
    with pytest.raises(UserError, match="--only x finds none of loop bf16, loop ternary, floor"):
        found_by("x", names)
    with pytest.raises(UserError, match=r"--only \(: no regular expression"):
        found_by("(", names)


def test_command_line_leaves_the_machine_out(monkeypatch):
    arguments = ["--out", "/somewhere/results", "--work=/a/b/work", "--name", "a b"]
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b=2")
    line = command_line()
    assert line.startswith("XLA_FLAGS='--xla_a=1 --xla_b=2' python")
    assert line.endswith("--out results --work=work --name 'a b'")


def test_package_versions_lists_what_is_installed():
    assert set(package_versions("jax", "no-such-package")) == {"python", "jax"}


def test_median_seconds_takes_the_median_and_rotates_the_inputs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    durations = {"a": 1.0, "b": 2.0, "c": 9.0}
    seen = []

    def work(name):
        seen.append(name)
        now[0] += durations[name]

    inputs = [("a",), ("b",), ("c",)]
    seconds = median_seconds(work, inputs, wait=lambda _: None, repeats=3, warmup=1)
    assert seconds == 2.0
    assert seen == ["a", "b", "c", "a"]


def test_median_seconds_divides_by_the_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def wait(_):
        now[0] += 6.0

    assert median_seconds(lambda: None, [()], wait=wait, repeats=1, calls=3) == 2.0


def test_median_seconds_refuses_nothing_to_do():
    with pytest.raises(
        ValueError, match="repeats >= 1, calls >= 1 and an input set, got repeats=0"
    ):
        median_seconds(lambda: None, [()], wait=lambda _: None, repeats=0)
