"""The scaling benchmarks at tiny size, and their arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from benchmarks import paper, scaling, scaling_times
from benchmarks.common import RESULTS, Figure, Result, read_result
from benchmarks.distill_setup import Setup
from flux_jax.configs import FluxConfig


def figures(folder, name):
    (path,) = folder.glob(f"{name}_*.json")
    return read_result(path).figures


@pytest.fixture
def shallow(monkeypatch):
    """The tiny size with a block of each kind: what is compiled here is not what is tested."""
    config = dataclasses.replace(FluxConfig.tiny(), depth=1, depth_single_blocks=1)
    monkeypatch.setattr(FluxConfig, "tiny", lambda: config)


@pytest.mark.long
@pytest.mark.usefixtures("shallow")
def test_distill_adds_a_row_for_each_number_of_devices(tmp_path):
    for devices in (2, 4):
        arguments = ["distill", "--devices", str(devices), "--tiny", "--steps", "12"]
        result = CliRunner().invoke(scaling.app, [*arguments, "--out", str(tmp_path)])
        assert result.exit_code == 0, (result.output, result.exception)
    found = figures(tmp_path, "scaling_distill_tiny")
    two, four = "2 devices, fsdp, adamw", "4 devices, fsdp, adamw"
    assert {name.rpartition("/")[0] for name in found} == {two, four}
    assert found[f"{four}/last_loss"].value < found[f"{four}/first_loss"].value
    ratio = found[f"{four}/rate"].value / found[f"{two}/rate"].value
    assert found[f"{four}/scaling"].value == pytest.approx(ratio, rel=1e-4)
    assert f"{two}/scaling" not in found


@pytest.mark.long
@pytest.mark.usefixtures("shallow")
def test_what_is_compiled_ahead_is_what_runs(tmp_path):
    """The same program to the letter, so that the run finds it in the cache."""
    arguments = ["distill", "--devices", "2", "--tiny", "--out", str(tmp_path)]
    programs = []
    compiled = Setup.compiled

    def kept(setup):
        lowered = setup.program.lower(setup.start.abstract(), setup.teacher, setup.rows)
        programs.append(lowered.as_text())
        return compiled(setup)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "compiled", kept)
        assert CliRunner().invoke(scaling.app, [*arguments, "--only-compile"]).exit_code == 0
        assert list(tmp_path.iterdir()) == []
        assert CliRunner().invoke(scaling.app, [*arguments, "--steps", "12"]).exit_code == 0
    assert programs[0] == programs[1]


@pytest.mark.long
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("kind", [[], ["--ternary"]])
def test_generate_draws_one_image_and_one_on_each_device(tmp_path, kind):
    arguments = ["generate", "--devices", "2", "--tiny", "--steps", "2", "--repeats", "1", *kind]
    result = CliRunner().invoke(scaling.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    found = figures(tmp_path, "scaling_generate_tiny")
    weights = "W1.58A8" if kind else "bf16"
    for how, images in (("one image", 1), ("an image each", 2)):
        row = f"2 devices, {how}, {weights}"
        each = images / found[f"{row}/seconds"].value
        assert found[f"{row}/rate"].value == pytest.approx(each, rel=1e-4)


def test_only_the_wanted_devices_draw():
    """Two of the eight that are here."""
    meshes = scaling.drawing_meshes(2)
    assert {how: dict(mesh.shape)["data"] for how, mesh in meshes.items()} == {
        "one image": 1,
        "an image each": 2,
    }
    assert {mesh.size for mesh in meshes.values()} == {2}
    assert list(scaling.drawing_meshes(1)) == ["one image"]


def test_rows_of_earlier_runs_stay(tmp_path):
    def add(row, rate):
        found = {"rate": Figure(value=rate, unit="x")}
        scaling.write("scaling_x", row, found, out=tmp_path, base=2, commit="abc")

    add("4 devices, fsdp", 7.0)
    add("2 devices, fsdp", 4.0)
    add("8 devices, fsdp", 12.0)
    add("4 devices, other", 1.0)
    add("2 devices, fsdp", 5.0)
    found = figures(tmp_path, "scaling_x")
    assert list(found) == [
        "2 devices, fsdp/rate",
        "4 devices, fsdp/rate",
        "4 devices, fsdp/scaling",
        "4 devices, other/rate",
        "8 devices, fsdp/rate",
        "8 devices, fsdp/scaling",
    ]
    assert found["4 devices, fsdp/scaling"].value == pytest.approx(1.4)


def test_rows_of_another_commit_say_so_and_are_not_compared(tmp_path):
    def add(row, rate, commit):
        found = {"rate": Figure(value=rate, unit="x", note="a note")}
        scaling.write("scaling_x", row, found, out=tmp_path, base=2, commit=commit)

    add("2 devices, fsdp", 4.0, "old" * 10)
    add("4 devices, fsdp", 7.0, "old" * 10)
    assert "4 devices, fsdp/scaling" in figures(tmp_path, "scaling_x")
    add("4 devices, fsdp", 9.0, "new" * 10)
    found = figures(tmp_path, "scaling_x")
    assert found["2 devices, fsdp/rate"].note == "a note, at oldoldoldold"
    assert found["4 devices, fsdp/rate"].note == "a note"
    assert "4 devices, fsdp/scaling" not in found
    add("8 devices, fsdp", 20.0, "newest" * 5)
    found = figures(tmp_path, "scaling_x")
    assert found["2 devices, fsdp/rate"].note == "a note, at oldoldoldold"
    assert found["4 devices, fsdp/rate"].note == "a note, at newnewnewnew"


def test_the_rate_that_utilisation_is_measured_against():
    """The step's products without attention, of the committed measurement."""
    (path,) = RESULTS.glob("transformer_step_nvidia-h200.json")
    found = json.loads(path.read_text())["figures"]
    rate = scaling.dense_rate(RESULTS, "NVIDIA H200")
    expected = found["paper_linears_tflop"]["value"] / found["floor_linears_ms"]["value"] * 1e15
    assert rate == pytest.approx(expected)
    assert scaling.dense_rate(RESULTS, "another card") is None


# -- computed times ------------------------------------------------------------------------------


def test_gathering_is_bound_by_the_slower_link():
    # 8 devices of one host: each lacks 7/8, at 450 GB/s.
    assert scaling_times.gathered_seconds(450e9, 8) == pytest.approx(7 / 8)
    # 16 on two hosts: half of it must come in through 8 cards of 50 GB/s.
    assert scaling_times.gathered_seconds(400e9, 16) == pytest.approx(max(15 / 16 * 400 / 450, 0.5))
    assert scaling_times.gathered_seconds(1e9, 1) == 0.0


def test_a_distillation_step_by_hand():
    config, step = FluxConfig.dev(), paper.Step()
    times = scaling_times.distill_step(config, step, 0.1, data=8, fsdp=8)
    # A double block: qkv 3, proj 1, MLP 4 + 4, modulation 6, of two streams; a single one: 7, 5, 3.
    square, attention = 3072**2, 2 * 4608**2 * 3072
    tokens = 4608 * square
    again = tokens * (19 * 7 + 38 * 7) + square * (19 * 12 + 38 * 3)
    forward = again + tokens * (19 * 5 + 38 * 5) + attention * 57
    assert times.compute == pytest.approx((4 + again / forward) * 0.1, rel=1e-6)
    moved = square * (19 * 2 * 12 + 38 * 12)
    gathered = (2 + 2 / 4 + 2) * moved * 7 / 8 / 450e9
    averaged = 2 * 7 / 8 * 2 * 11.9e9 / 8 / 50e9
    assert times.exchange == pytest.approx(gathered + averaged, rel=5e-3)
    assert times.sequential == pytest.approx(times.compute + times.exchange)
    assert times.overlapped == pytest.approx(max(times.compute, times.exchange))
    assert scaling_times.distill_step(config, step, 0.1, data=1, fsdp=1).exchange == 0.0


def test_an_image_over_devices_by_hand():
    config = dataclasses.replace(FluxConfig.dev(), depth=1, depth_single_blocks=0)
    step = paper.Step()
    times = scaling_times.image_step(config, step, 0.12, sequence=4)
    # Of q, k, v and the result, a quarter of the tokens, three quarters of the heads.
    sent = 4 * (4608 / 4) * 3072 * 2 * 3 / 4
    assert times.compute == pytest.approx(0.03)
    assert times.exchange == pytest.approx(sent / 450e9 + 2 * scaling_times.LATENCY)
    assert scaling_times.image_step(config, step, 0.12, sequence=1).exchange == 0.0


def test_every_row_follows_from_one_device(tmp_path):
    source = read_result(RESULTS / "transformer_step_nvidia-h200.json")
    found = scaling_times.figures(source)
    one = found["draw, 1 device/sequential"].value
    assert one == pytest.approx(source.figures["step_ms/hoisted"].value)
    assert found["draw, 64 devices, data 64/rate"].value == pytest.approx(64 / (28 * one / 1e3))
    path = Result(benchmark="scaling_times", device="x", figures=found).write(tmp_path)
    assert read_result(path).figures.keys() == found.keys()
