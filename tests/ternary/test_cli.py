"""`python -m ternary`, as users run it."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from ternary.cli import app
from ternary.storage.checkpoint import open_checkpoint
from tests.small_pipeline import small_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("teacher") / "m")


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    result = run("quantize", teacher, out, "--granularity", "group128", "--refit", "2")
    return out, result


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_quantize_tells_what_it_made(made):
    out, result = made
    assert result.exit_code == 0, result.stderr
    said = re.search(r"([\d.]+)% of the transformer's ([\d,]+) parameters", result.stdout)
    with open_checkpoint(out) as checkpoint:
        total = sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
        assert checkpoint.description.quant.granularity == "group128"
    assert int(said[2].replace(",", "")) == total


def test_inspect(made):
    result = run("inspect", made[0], "--quiet")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["layer", "shape", "zeros", "scale", "error", "bits"]
    assert lines[1].startswith("double_blocks.0.img_attn.proj")
    assert "a scale per group128" in lines[-3]
    assert "times smaller than bf16" in lines[-1]


def test_inspect_json_counts_right(made, teacher):
    result = run("inspect", made[0], "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    with open_checkpoint(made[0]) as checkpoint:
        for layer in report["layers"]:
            codes = checkpoint.codes(layer["name"])
            scale = checkpoint.read(f"{layer['name']}.scale").astype(np.float64)
            assert layer["shape"] == list(codes.shape)
            assert layer["zeros"] == pytest.approx(np.mean(codes == 1))
            assert layer["scale"] == pytest.approx(scale.mean(), rel=1e-5)
            rows, columns = codes.shape
            stored = rows * -(-columns // 5) + 2 * rows * -(-columns // 128)
            assert layer["bits"] == pytest.approx(8 * stored / codes.size)
            assert 0.3 < layer["relative_error"] < 0.6
        ternary = sum(np.prod(layer["shape"]) for layer in report["layers"])
        total = sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
    assert report["parameters"] == total
    assert report["ternary_fraction"] == pytest.approx(ternary / total)


def test_patterns(teacher, tmp_path):
    arguments = ("--include", "single_blocks.*", "--exclude", "*.modulation.lin", "-q", "--json")
    result = run("quantize", teacher, tmp_path / "m", *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.layers == ["single_blocks.0.linear1", "single_blocks.0.linear2"]
        shapes = checkpoint.shapes
    told = json.loads(result.stdout)
    chosen = sum(np.prod(shapes[f"single_blocks.0.linear{i}.weight"]) for i in (1, 2))
    assert told["parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    assert told["ternary_share"] == pytest.approx(chosen / told["parameters"])
    files = (tmp_path / "m" / "transformer").iterdir()
    assert told["transformer_bytes"] == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("more", [("--json",), ("--json", "--quiet"), (), ("--quiet",)])
def test_distill_tells_how_it_ended(monkeypatch, tmp_path, more):
    import ternary.distillation.run as runs

    outcome = runs.Outcome(
        student=tmp_path / "student",
        steps=1200,
        loss=0.5,
        median_psnr=20.0,
        score=None,
        teacher_score=None,
    )
    monkeypatch.setattr(runs, "distill", lambda *arguments, **options: outcome)
    result = run("distill", "--teacher", "tiny", "--prompts", "p", "--out", tmp_path, *more)
    assert (result.exit_code, result.stderr) == (0, "")
    if "--json" in more:
        told = json.loads(result.stdout)
        assert told == {**vars(outcome), "student": str(tmp_path / "student")}
    elif more:
        assert result.stdout == ""
    else:
        figures = "1,200 steps, loss 0.50000; held-out pictures 20.00 dB (median)"
        assert result.stdout == f"{tmp_path / 'student'}: {figures}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--granularity", "row"), "granularity must be one of tensor, channel, group128"),
        (("--activation-bits", "4"), "activation_bits must be 8 or 16, got 4"),
        (("--include", "nothing.*"), "include pattern 'nothing.*' matches none"),
    ],
)
def test_quantize_refuses(teacher, tmp_path, arguments, message):
    result = run("quantize", teacher, tmp_path / "m", "--quiet", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_a_ternary_model_is_not_quantised_again(tmp_path, command):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    given = {
        "quantize": ("tiny-ternary", tmp_path / "m"),
        "calibrate": ("--teacher", "tiny-ternary", "--prompts", prompts, "--out", tmp_path / "m"),
    }
    result = run(command, *given[command], "--quiet")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith(" is ternary already; give the dense model it was made from\n")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [prompts]


def test_inspect_refuses_a_dense_checkpoint(teacher):
    result = run("inspect", teacher)
    assert result.exit_code == 2
    assert "says nothing of ternary weights: this model is dense" in result.stderr


def test_no_such_folder(tmp_path):
    result = run("inspect", tmp_path / "nothing")
    assert result.exit_code == 2
    assert (
        result.stderr == f"error: {tmp_path / 'nothing'}: no such folder, expected a ternary "
        "checkpoint\n"
    )


def test_no_ternary_checkpoint(tmp_path):
    """As a Flax checkpoint is none; before any bar is shown."""
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "file"
    file.touch()
    for given, message in (
        (tmp_path, f"no ternary checkpoint: {tmp_path / 'transformer'} has no config.json"),
        (file, "is no folder, expected a ternary checkpoint"),
    ):
        result = run("inspect", given)
        assert result.exit_code == 2
        assert result.stderr == f"error: {given}: {message}\n"


def test_what_cannot_be_quantised_is_one_line(tmp_path):
    """Without a bar before it."""
    result = run("quantize", tmp_path / "nothing", tmp_path / "m")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nothing'}: no such file or folder")
