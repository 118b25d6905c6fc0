"""A run's page: what it says, what it says of parts that are missing, and that it is safe."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html.parser
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ternary.cli import app
from ternary.config import QuantConfig
from ternary.distillation.held_out import grid
from ternary.policy import Policy
from ternary.run_report.charts import Axis
from ternary.run_report.folder import read_run
from ternary.run_report.layers import blocks, inspect_student
from ternary.run_report.page import render
from ternary.run_report.scores import _rounded, of_others, read_evaluations
from ternary.storage.checkpoint import open_checkpoint
from ternary.storage.inspection import inspect_checkpoint
from ternary.storage.rounding import quantize_checkpoint
from tests.small_pipeline import small_folder
from tests.ternary.run_report.run_folder import (
    PROMPTS,
    SIDE,
    STEPS,
    STUDENT_RGB,
    TEACHER_RGB,
    all_scores,
    evaluate,
    make_run,
    metrics_row,
    write_metrics,
)

ROOT = Path(__file__).resolve().parents[3]
VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """A page's elements with their attributes, and its text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not self._open or self._open[-1] != "style":
            self.text += data + " "

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("teacher") / "m")


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "s"
    quantize_checkpoint(teacher, folder, QuantConfig(refit_steps=2), Policy())
    return folder


@pytest.fixture(scope="module")
def finished(teacher, student, tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", teacher=str(teacher))
    shutil.copytree(student, folder / "student")
    return folder


def report(folder, *more):
    result = CliRunner().invoke(app, ["report", str(folder), "--quiet", *map(str, more)])
    assert result.exit_code == 0, result.output
    return (folder / "report.html").read_text("utf-8")


def page_of(folder) -> Page:
    """Of a run without a student."""
    run = read_run(folder)
    now = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
    return Page(render(run, read_evaluations(run), None, {}, now=now))


def test_a_finished_run_has_all_its_parts(finished, teacher, student):
    page = Page(report(finished, "--force"))
    assert "Finished: 40 steps." in page.text
    assert "Not in this report" not in page.text
    titles = re.findall(r"<h2>(.*?)</h2>", (finished / "report.html").read_text("utf-8"))
    assert titles == [
        "Composition score",
        "Teacher and student, from the same noise",
        "Training",
        "Layers",
        "Settings",
    ]
    for title in ("Loss", "Learning rate", "Zeros by block", "Error of the weights by block"):
        plots = [p for p in page.all("div", class_="plot") if p["aria-label"].startswith(title)]
        assert len(plots) == 1, title
    inspected = inspect_checkpoint(student)
    assert f"{inspected.bits_per_parameter:.2f}" in page.text
    for layer in inspected.layers:
        assert layer.name in page.text
    # Teacher, student, and before training, of six categories and overall.
    bars = [a["style"] for t, a in page.elements if t == "i" and "style" in a]
    assert bars.count("width:100.0%") == 14
    assert bars.count("width:0.0%") == 7
    assert f"teacher {teacher}" in page.text
    # What differs from the default is told beside it.
    assert "seed 7 0" in page.text


def test_curves_hold_the_runs_values(finished):
    plots = Page(report(finished, "--force")).all("div", class_="plot")
    (loss,) = (p for p in plots if p["aria-label"].startswith("Loss."))
    (line,) = json.loads(loss["data-series"])
    assert [point[2] for point in line["points"]] == [str(step) for step in range(1, STEPS + 1)]
    values = [float(point[3]) for point in line["points"]]
    np.testing.assert_allclose(values, 1 / np.arange(1, STEPS + 1), rtol=1e-3)
    lefts, tops = (np.array([point[i] for point in line["points"]]) for i in (0, 1))
    assert lefts[0] == 0
    assert lefts[-1] == 100
    # The axis is logarithmic: the height is linear in the logarithm.
    slope = np.diff(tops) / np.diff(np.log(values))
    np.testing.assert_allclose(slope, slope[0], rtol=0.1)


def pixels(address: str) -> np.ndarray:
    assert address.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def choices(page: Page) -> list[list[str | None]]:
    """What can be chosen in each gallery."""
    found: list[list[str | None]] = []
    for tag, attributes in page.elements:
        if tag == "select":
            found.append([])
        elif tag == "option":
            found[-1].append(attributes["value"])
    return found


def verdicts(page: Page) -> list[dict[str, str | None]]:
    return page.all("span", class_="verdict")


def test_pictures_are_the_runs_and_named(finished):
    page = Page(report(finished, "--force"))
    assert len(page.all("figure", class_="pair")) == len(PROMPTS)
    images = page.all("img")
    for prompt in PROMPTS:
        (teacher,) = (i for i in images if i["alt"] == f"teacher: {prompt}")
        (student,) = (i for i in images if i["alt"] == f"student: {prompt}")
        assert np.abs(pixels(teacher["src"]).astype(int) - (255, 0, 0)).max() < 8
        assert np.abs(pixels(student["src"]).astype(int) - (0, 0, 255)).max() < 8
    assert "During the run 3 of 3 held-out prompts whose pictures the run kept." in page.text
    assert "Composition prompts" not in page.text
    assert choices(page) == [["step 0", "step 20", "step 40"]]
    # The last is in the page already.
    (views,) = json.loads(page.scripts[0])
    assert list(views) == ["step 0", "step 20"]
    for addresses in views.values():
        assert len(addresses) == len(PROMPTS)
        assert np.abs(pixels(addresses[0]).astype(int) - (0, 0, 255)).max() < 8
    sliders = [i for i in page.all("input", type="range") if "aria-label" in i]
    assert [any(p in s["aria-label"] for s in sliders) for p in PROMPTS] == [True] * 3


def test_nothing_is_asked_of_a_network_and_every_text_is_escaped(tmp_path):
    folder = make_run(tmp_path / "<script>alert(1)</script>&amp;".replace("/", "|"))
    settings = folder / "run.yaml"
    settings.write_text(settings.read_text() + 'note: "</table><img src=x onerror=alert(1)>"\n')
    legend = folder / "samples" / "step_000040.json"
    content = json.loads(legend.read_text())
    content["shown"][0]["prompt"] = "</script><script>alert(2)</script>\x00"
    for step in (0, 20, 40):
        legend.with_name(f"step_{step:06d}.json").write_text(json.dumps(content))
    page = page_of(folder)
    assert len(page.all("script")) == 2
    assert not [e for e in page.elements if "onerror" in e[1]]
    assert "<script>alert(1)<|script>&amp;" in page.text
    assert "</script><script>alert(2)</script>" in page.text
    assert "</table><img src=x onerror=alert(1)>" in page.text
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy[0]["content"]


def test_a_run_in_progress_says_so(tmp_path):
    folder = make_run(tmp_path / "run")
    write_metrics(folder, [metrics_row(step) for step in range(1, 31)])
    # The last row is being written.
    with (folder / "metrics.csv").open("a") as file:
        file.write("31,0.1")
    page = page_of(folder)
    assert "Not finished: step 30 of 40, reported " in page.text
    assert "There is no student yet" in page.text
    # Drawn by an earlier process, after its last checkpoint.
    assert choices(page) == [["step 0", "step 20"]]


def test_all_steps_without_a_student(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert "All 40 steps are taken; student/ is not in the folder." in page.text


def test_the_record_of_the_shipped_student():
    """A real run of before the pictures had legends; only its tables and settings were kept."""
    page = page_of(ROOT / "examples" / "tiny_flux" / "record" / "student")
    assert "All 18,000 steps are taken; student/ is not in the folder." in page.text
    assert "composition score 0.936 98.4% kept; teacher 0.951" in page.text
    assert "samples/ has no pictures." in page.text
    assert "this run recorded no categories" in page.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run.yaml", "run.yaml is missing"),
        ("metrics.csv", "metrics.csv is missing"),
        ("held_out.csv", "held_out.csv is missing"),
        ("samples", "samples/ has no pictures"),
        ("checkpoints", "All 40 steps"),
        ("student", "There is no student yet"),
    ],
)
def test_a_missing_part_is_named(tmp_path, name, said):
    folder = make_run(tmp_path / "run")
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    assert said in page_of(folder).text


def test_damaged_parts_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "run.yaml").write_bytes(b"\xff: [")
    (folder / "held_out.csv").write_text("step,score\n")
    (folder / "samples" / "step_000040.png").write_bytes(b"\x89PNG\r\n")
    (folder / "samples" / "step_000020.json").write_text('{"shown": 3')
    page = page_of(folder)
    assert "run.yaml cannot be read" in page.text
    assert "held_out.csv has no row yet" in page.text
    # The only student that is left needs no choice.
    assert choices(page) == []
    assert [list(json.loads(note["data-notes"] or "")) for note in verdicts(page)] == [
        ["step 0"]
    ] * 3


@pytest.mark.parametrize("text", ["seed: 2024-99-99\n", f"seed: {'1' * 5000}\n"])
def test_settings_with_a_value_that_is_none_are_left_out(tmp_path, text):
    folder = make_run(tmp_path / "run")
    (folder / "run.yaml").write_text(text)
    assert "run.yaml cannot be read" in page_of(folder).text


def test_a_table_that_begins_with_an_empty_line(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "held_out.csv").write_text("\n\n")
    assert "held_out.csv has no row yet" in page_of(folder).text


def test_what_the_run_is_about_stands_first_among_its_settings(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "run.yaml").open("a") as file:
        file.write("held_out_prompts: composition\n")
    run = read_run(folder)
    now = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
    text = render(run, read_evaluations(run), None, {}, now=now).partition("<h2>Settings</h2>")[2]
    names = re.findall(r'<th scope="row">(.*?)</th>', text.partition("</table>")[0])
    assert names == ["held_out_prompts", "prompts", "teacher", "seed", "distill.steps"]


def test_pictures_without_a_legend_are_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "samples" / "step_000020.json").unlink()
    page = page_of(folder)
    assert choices(page) == [["step 0", "step 40"]]
    said = "samples/step_000020.png cannot be shown: the .json beside it is missing or incomplete."
    assert said in page.text
    for legend in (folder / "samples").glob("*.json"):
        legend.unlink()
    page = page_of(folder)
    assert not page.all("img")
    assert "samples/step_000000.png and 2 more cannot be shown" in page.text


def test_grids_of_an_earlier_version_are_left_out(tmp_path):
    """Their legends say nothing of the gap inside a pair."""
    folder = make_run(tmp_path / "run")
    for legend in (folder / "samples").glob("*.json"):
        content = json.loads(legend.read_text())
        del content["gap"]
        legend.write_text(json.dumps(content))
    page = page_of(folder)
    assert not page.all("img")
    assert "samples/step_000000.png and 2 more cannot be shown" in page.text


def plain(count: int) -> list[np.ndarray]:
    """Red and blue pictures."""
    return [
        np.broadcast_to(np.array(rgb, np.float32), (count, SIDE, SIDE, 3))
        for rgb in (TEACHER_RGB, STUDENT_RGB)
    ]


def test_the_two_pictures_of_a_pair_do_not_touch():
    drawn = np.asarray(grid(*plain(5)))
    letters = {(255, 0, 0): "r", (0, 0, 255): "b", (255, 255, 255): " "}
    top, bottom = ("".join(letters[tuple(rgb)] for rgb in drawn[row].tolist()) for row in (0, -1))
    pair = "r" * SIDE + "  " + "b" * SIDE
    # Four pairs, further from each other than what they are of, and the fifth below.
    assert top == "      ".join([pair] * 4)
    assert bottom == pair.ljust(len(top))
    assert len(drawn) == 2 * SIDE + 6


def held_out_lines(folder) -> dict[str, list[float]]:
    plots = page_of(folder).all("div", class_="plot")
    (plot,) = (p for p in plots if (p["aria-label"] or "").startswith("Held-out pictures"))
    lines = json.loads(plot["data-series"] or "")
    return {line["name"]: [float(point[3]) for point in line["points"]] for line in lines}


def test_of_few_pictures_the_lowest_is_told(tmp_path):
    folder = make_run(tmp_path / "run")
    # Of each drawing's own pictures; the table has what a percentile makes of them.
    assert held_out_lines(folder) == {"median": [10, 15, 20], "lowest": [10, 30, 50]}
    legends = sorted((folder / "samples").glob("*.json"))
    for legend in legends:
        content = json.loads(legend.read_text())
        content["shown"] *= 4
        legend.write_text(json.dumps(content))
    many = held_out_lines(folder)
    assert many == {"median": [10, 15, 20], "10th percentile": [5, 7.5, 10]}
    for legend in legends:
        legend.unlink()
    assert held_out_lines(folder) == many


def test_bits_are_those_of_the_ternary_layers_and_of_the_rest(finished, student):
    inspected = inspect_checkpoint(student)
    low, high = (bits(layer.bits for layer in inspected.layers) for bits in (min, max))
    with open_checkpoint(student) as checkpoint:
        ternary = sum(math.prod(checkpoint.shapes[f"{n}.weight"]) for n in checkpoint.layers)
        rest = [
            stored.dtype.itemsize
            for name, stored in checkpoint.stored.items()
            if name.rpartition(".")[0] not in checkpoint.layers or name.endswith(".bias")
        ]
    (width,) = set(rest)
    share = 1 - ternary / inspected.parameters
    said = f"ternary layers at {low:.2f}-{high:.2f} bits, the other {share:.1%} of all "
    text = Page(report(finished, "--force")).text
    assert said in text
    assert f" parameters at {8 * width} " in text.partition(said)[2][:40]


def test_only_kinds_of_layers_that_are_there_are_explained(tmp_path, student):
    run = read_run(make_run(tmp_path / "run"))
    inspected = inspect_checkpoint(student)

    def key(names: list[str]) -> str:
        layers = tuple(
            dataclasses.replace(layer, name=name)
            for layer, name in zip(inspected.layers, names, strict=False)
        )
        named = dataclasses.replace(inspected, layers=layers)
        now = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
        text = Page(render(run, read_evaluations(run), named, {}, now=now)).text
        return text.partition("to its highest. ")[2].partition(".")[0]

    both = ["double_blocks.0.a", "single_blocks.10.b"]
    assert key(both) == "D: double blocks, S: single blocks"
    assert key(both[1:]) == "S: single blocks"
    assert key([*both, "img_in"]) == (
        "D: double blocks, S: single blocks, rest: layers outside the blocks"
    )


def test_losses_that_are_not_finite_are_marked(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [metrics_row(step) for step in range(1, 31)]
    rows[9]["loss"], rows[19]["loss"] = float("nan"), float("inf")
    write_metrics(folder, rows)
    page = page_of(folder)
    assert "Not finite at step 10 and 1 more." in page.text
    assert len(page.all("path", class_="wrong")) == 2
    write_metrics(folder, [metrics_row(step, loss=float("nan")) for step in range(1, 31)])
    assert "No value can be drawn." in page_of(folder).text


def test_without_scores_the_page_says_how_to_get_them(tmp_path):
    page = page_of(make_run(tmp_path / "run", scored=False))
    assert "This run's held-out prompts have no score." in page.text
    assert "python -m ternary report RUN --score" in page.text


def test_an_evaluation_is_shown_in_place_of_the_runs_scores(tmp_path):
    folder = make_run(tmp_path / "run")
    evaluate(folder, teacher=0.75, student=0.5, rounded=0.25)
    page = page_of(folder)
    assert "plain rounding: 3 pictures" in page.text
    assert "0.500 66.7% kept; teacher 0.750" in page.text
    assert "teacher passes; student fails (<i>none</i> seen)" in page.text
    # Bounded: the longer side is 256 pixels.
    assert pixels(page.all("img")[-1]["src"]).shape == (171, 256, 3)
    (folder / "evaluation" / "rounded" / "report.json").unlink()
    assert "plain rounding" not in page_of(folder).text


def test_pictures_of_the_run_and_of_the_scores_are_both_there(tmp_path):
    folder = make_run(tmp_path / "run")
    evaluate(folder, teacher=0.75, student=0.5, rounded=0.25)
    page = page_of(folder)
    drawn, scored = (page.text.index(title) for title in ("During the run", "Composition prompts"))
    assert "3 of 3 held-out prompts whose pictures the run kept." in page.text[drawn:scored]
    assert "3 of 3 composition prompts that --score drew and judged." in page.text[scored:]
    assert choices(page) == [["step 0", "step 20", "step 40"], ["plain rounding", "student"]]
    assert [list(views) for views in json.loads(page.scripts[0])] == [
        ["step 0", "step 20"],
        ["plain rounding"],
    ]
    assert len(page.all("figure", class_="pair")) == 2 * len(PROMPTS)
    # Each has a switch of its own.
    modes = [mode["name"] for mode in page.all("input", type="radio")]
    assert modes == ["mode-0"] * 2 + ["mode-1"] * 2
    # What has no picture is not named.
    shutil.rmtree(folder / "samples")
    page = page_of(folder)
    assert "During the run" not in page.text
    assert len(page.all("figure", class_="pair")) == len(PROMPTS)
    for picture in (folder / "evaluation" / "teacher").glob("*.png"):
        picture.unlink()
    assert "Composition prompts" not in page_of(folder).text
    assert "Teacher and student, from" not in page_of(folder).text


def test_scores_of_another_student_are_not_shown(tmp_path, student):
    folder = make_run(tmp_path / "run")
    for kind in ("teacher", "student", "rounded"):
        place = folder / "evaluation" / kind
        place.mkdir(parents=True)
        content = {
            "scores": all_scores(0.5),
            "settings": {"model": str(student)},
            "images": [
                {
                    "file": "0.png",
                    "prompt": prompt,
                    "category": "colors",
                    "seed": 0,
                    "passed": True,
                    "reasons": [],
                }
                for prompt in PROMPTS
            ],
        }
        Image.new("RGB", (300, 200), (0, 255, 0)).save(place / "0.png")
        (place / "report.json").write_text(json.dumps(content))
    shown = Page(report(folder, "--student", student, "--force")).text
    assert "plain rounding: 3 pictures" in shown
    other = Page(report(folder, "--student", "tiny-ternary", "--force")).text
    assert "plain rounding: 3 pictures" not in other
    assert f"evaluation/ has the scores of another student, {student}" in other
    # A name of the hub, and a folder that has moved, tell nothing.
    kept = read_evaluations(read_run(folder))
    assert of_others(kept, student=student, teacher="owner/name") == []
    assert of_others(kept, student=tmp_path / "moved") == []


@pytest.mark.parametrize("ends", [(0.6, 0.9), (0.022, 0.027), (2.2, 4.5), (1.0, 1.0), (1e-4, 3.0)])
def test_a_logarithmic_axis_has_numbers(ends):
    axis = Axis.around(np.asarray(ends), log=True)
    assert axis is not None
    ticks = axis.ticks()
    assert len(ticks) >= 2
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_plain_rounding_is_of_the_teacher_that_is_scored(teacher, student, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    folder, found = tmp_path / "evaluation" / "rounded", []
    folder.parent.mkdir()
    for named in (teacher, teacher, other):
        made = _rounded(named, student, folder) / "transformer" / "ternary.safetensors"
        found.append(made.stat().st_ino)
    assert found[0] == found[1] != found[2]


@pytest.mark.long
def test_score_draws_and_judges_all_three(teacher, student, tmp_path):
    folder = make_run(tmp_path / "run", teacher=str(teacher))
    settings = folder / "run.yaml"
    text = settings.read_text().replace("sampling_steps: 28", "sampling_steps: 1")
    settings.write_text(text.replace("sample_batch_size: 1", "sample_batch_size: 6"))
    named = ("--student", student, "--score", "--limit", 1, "--force")
    text = report(folder, *named)
    assert "plain rounding: 6 pictures" in Page(text).text
    reports = {
        kind: json.loads((folder / "evaluation" / kind / "report.json").read_text())
        for kind in ("teacher", "student", "rounded")
    }
    assert len({found["settings"]["fingerprint"] for found in reports.values()}) == 3
    for found in reports.values():
        assert found["settings"]["num_inference_steps"] == 1
        assert [image["seed"] for image in found["images"]] == list(range(6))
    with open_checkpoint(folder / "evaluation" / "rounded_checkpoint") as rounded:
        # The student was refitted; plain rounding is not.
        assert rounded.description.quant == QuantConfig()
        assert set(rounded.layers) == {layer.name for layer in inspect_checkpoint(student).layers}
    pictures = sorted((folder / "evaluation").glob("*/*.png"))
    before = [path.stat().st_mtime_ns for path in pictures]
    assert len(pictures) == 18
    report(folder, *named)
    assert [path.stat().st_mtime_ns for path in pictures] == before


def test_layers_are_measured_against_the_teacher(teacher, student):
    found, distances = inspect_student(student, str(teacher))
    assert set(distances) == {layer.name for layer in found.layers}
    for layer in found.layers:
        # The student is the teacher, refitted: nearer than the absolute mean, and as recorded.
        distance = distances[layer.name]
        assert distance.student == pytest.approx(layer.relative_error, abs=2e-3)
        assert distance.student < distance.rounded
    names = [block.name for block in blocks(found)]
    assert names == ["double_blocks.0", "single_blocks.0"]
    with open_checkpoint(student) as checkpoint:
        codes = [checkpoint.codes(n) for n in checkpoint.layers if n.startswith("double_blocks.0.")]
    zeros = sum((c == 1).sum() for c in codes) / sum(c.size for c in codes)
    assert blocks(found)[0].zeros == pytest.approx(zeros)
    assert inspect_student(student, "nowhere/at-all")[1] == {}


def test_models_may_lie_in_the_home_folder(tmp_path, teacher, student, monkeypatch):
    (tmp_path / "teacher").symlink_to(teacher)
    (tmp_path / "student").symlink_to(student)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_run(tmp_path / "run", teacher="~/teacher")
    page = Page(report(folder, "--student", "~/student"))
    assert "Error of the weights by block" in page.text
    again = Page(report(folder, "--student", "~/student", "--teacher", "~/teacher", "--force"))
    assert "Error of the weights by block" in again.text


def test_a_teacher_that_is_no_checkpoint_any_more_is_named(tmp_path, student):
    gone = tmp_path / "teacher"
    gone.mkdir()
    folder = make_run(tmp_path / "run", teacher=str(gone))
    shutil.copytree(student, folder / "student")
    page = Page(report(folder))
    assert f"The teacher cannot be read: {gone}: neither model_index.json nor" in page.text
    arguments = ("report", folder, "--force", "--teacher", gone)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2
    assert "neither model_index.json nor" in result.stderr


def test_refusals(tmp_path, finished):
    def refused(*arguments):
        result = CliRunner().invoke(app, ["report", *map(str, arguments)])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "holds no distillation run: no such folder" in refused(tmp_path / "none")
    assert "it has no run.yaml and no metrics.csv" in refused(tmp_path)
    report(finished, "--force")
    before = (finished / "report.html").read_text()
    assert "exists already; --force replaces it" in refused(finished)
    assert (finished / "report.html").read_text() == before
    assert "does not exist" in refused(finished, "--out", tmp_path / "no" / "page.html")
    folder = make_run(tmp_path / "run")
    assert "names no student to score: give --student" in refused(folder, "--score")
    assert "--limit is of --score: give both" in refused(folder, "--limit", 10)
    assert "--student nothing: no such folder" in refused(folder, "--student", "nothing")
    assert "--teacher nothing: no such folder, and neither" in refused(
        folder, "--teacher", "nothing"
    )


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two #rrggbb colours."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_enough_contrast(finished):
    text = report(finished, "--force")
    themes = [
        dict(re.findall(r"--([a-z]+): (#\w{6});", part)) for part in text.split(":root {")[1:3]
    ]
    assert len(themes) == 2
    for colors in themes:
        for ground in ("paper", "card"):
            for name in ("ink", "soft"):
                assert contrast(colors[name], colors[ground]) >= 4.5, name
            for name in ("teacher", "student", "rounded", "other", "wrong", "good", "open"):
                assert contrast(colors[name], colors[ground]) >= 3, name
