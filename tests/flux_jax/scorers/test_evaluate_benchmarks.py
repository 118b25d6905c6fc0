"""`python -m flux_jax evaluate geneval|compbench|dpg`: layouts as the scorers read them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flux_jax.cli import app
from flux_jax.errors import UserError
from flux_jax.metadata import read_png
from flux_jax.pipeline import FluxPipeline
from flux_jax.scorers.run import folder_names
from tests.jobs import finish, start
from tests.small_pipeline import small_folder

PROMPTS = ["a red circle", "a blue cube on a star", "a star"]
GENEVAL = [
    {"tag": "colors", "include": [{"class": "x", "count": 1}], "prompt": prompt}
    for prompt in PROMPTS
]
FAST = ("--steps", "1", "--dtype", "fp32", "--quiet")


def run(benchmark, *arguments, code=0):
    result = CliRunner().invoke(app, ["evaluate", benchmark, *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(benchmark, *arguments):
    result = run(benchmark, *arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The three benchmarks' prompt files, of three prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    (folder / "color_val.txt").write_bytes("\r\n".join(PROMPTS).encode())
    (folder / "prompts").mkdir()
    for name, prompt in zip(("0", "diffusiondb19", "whoops31"), PROMPTS, strict=True):
        (folder / "prompts" / f"{name}.txt").write_text(prompt)
    return {
        "geneval": folder / "evaluation_metadata.jsonl",
        "compbench": folder / "color_val.txt",
        "dpg": folder / "prompts",
    }


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# What each scorer does with a folder, in our words; see the files named in `flux_jax.scorers`.


def as_geneval_reads(folder):
    """{line number: (metadata, pictures)}; evaluation/evaluate_images.py, main."""
    found = {}
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or not place.name.isdigit():
            continue
        names = [path.name for path in (place / "samples").iterdir()]
        assert all(re.fullmatch(r"\d+\.png", name) for name in names)
        metadata = json.loads((place / "metadata.jsonl").read_text())
        found[int(place.name)] = (metadata, sorted(names))
    return found


def as_compbench_reads(folder):
    """[(prompt, question_id)] in the scorer's order; BLIP_vqa.py, Create_annotation_for_BLIP."""
    names = [path.name for path in (folder / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    return [(name.split("_")[0], int(name.split("_")[-1].split(".")[0])) for name in names]


def as_dpg_reads(images, resolution, pictures):
    """{key: its crops}; compute_dpg_bench.py, compute_dpg_one_sample."""
    found = {}
    for path in images.iterdir():
        with Image.open(path) as image:
            corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
            crops = [
                np.asarray(image.crop((x, y, x + resolution, y + resolution)).convert("RGB"))
                for x, y in corners[:pictures]
            ]
        found[path.name.split(".")[0]] = crops
    return found


@pytest.mark.long
@pytest.mark.slow
def test_geneval_of_teacher_and_student(files, tmp_path):
    """The shipped models, from the same noise."""
    models = ("--model", "tiny", "--model", "tiny-ternary")
    out = tmp_path / "out"
    options = ("--num-images", "2", "--steps", "2", "--seed", "5")
    result = run("geneval", "--prompts", files["geneval"], "--out", out, *models, *options)
    for name in ("tiny", "tiny-ternary"):
        found = as_geneval_reads(out / name)
        assert found == {
            line: (metadata, ["0000.png", "0001.png"]) for line, metadata in enumerate(GENEVAL)
        }
        folder = str(out / name)
        assert f"evaluation/evaluate_images.py {folder} --outfile {folder}/results" in result.stdout
        assert f"evaluation/summary_scores.py {folder}/results.jsonl" in result.stdout
        parts = [pixels(out / name / "00001" / "samples" / f"000{i}.png") for i in (0, 1)]
        np.testing.assert_array_equal(
            pixels(out / name / "00001" / "grid.png"), np.concatenate(parts, axis=1)
        )
        manifest = json.loads((out / name / "manifest.json").read_text())
        assert manifest["complete"]
        assert [image["seed"] for image in manifest["images"]] == [5, 6] * 3
        for image in manifest["images"]:
            record = read_png(out / name / image["file"])
            assert (record.prompt, record.seed) == (image["prompt"], image["seed"])
            assert record.num_inference_steps == manifest["num_inference_steps"] == 2
            assert record.fingerprint == manifest["fingerprint"]
    again = run("geneval", "--prompts", files["geneval"], "--out", out, *models, *options)
    assert again.stderr.count("6 images, 0 drawn now") == 2


def test_compbench(files, model, tmp_path):
    arguments = ("--prompts", files["compbench"], "--model", model, *FAST, "--num-images", 3)
    result = run("compbench", *arguments, "--out", tmp_path, "--json")
    report = json.loads(result.stdout)
    (one,) = report["models"]
    assert (one["images"], one["drawn"]) == (9, 9)
    folder = tmp_path / model.name
    expected = [(prompt, 3 * row + i) for row, prompt in enumerate(PROMPTS) for i in range(3)]
    assert as_compbench_reads(folder) == expected
    assert one["commands"] == [f"(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={folder})"]
    seeds = [read_png(folder / "samples" / f"{p}_{n:06d}.png").seed for p, n in expected]
    assert seeds == [0, 1, 2] * 3


@pytest.mark.parametrize("pictures", [1, 3, 4])
def test_dpg(files, model, tmp_path, pictures):
    arguments = ("--prompts", files["dpg"], "--model", model, *FAST, "--out", tmp_path)
    result = run("dpg", *arguments, "--num-images", pictures)
    folder = tmp_path / model.name
    found = as_dpg_reads(folder / "images", 32, pictures)
    assert sorted(found) == ["0", "diffusiondb19", "whoops31"]
    for key, crops in found.items():
        for number, crop in enumerate(crops):
            np.testing.assert_array_equal(crop, pixels(folder / "parts" / f"{key}-{number}.png"))
    assert f"PIC_NUM={pictures} bash dpg_bench/dist_eval.sh {folder}/images 32" in result.stdout


def test_devices_share_the_images(files, model, tmp_path):
    """Two devices, one image at a time on each, draw what one draws."""
    arguments = ("--prompts", files["dpg"], "--model", model, *FAST)
    run("dpg", *arguments, "--out", tmp_path / "one")
    run("dpg", *arguments, "--out", tmp_path / "two", "--mesh", "data=2")
    for name in ("0", "diffusiondb19", "whoops31"):
        one, two = (
            pixels(tmp_path / n / "small" / "images" / f"{name}.png") for n in ("one", "two")
        )
        np.testing.assert_allclose(one.astype(int), two.astype(int), atol=1)
    assert "a mesh is written" in refused(
        "dpg", *arguments, "--out", tmp_path / "x", "--mesh", "what=2"
    )


def test_an_image_that_changed_changes_its_grid(files, model, tmp_path):
    arguments = ("--prompts", files["dpg"], "--model", model, *FAST, "--out", tmp_path)
    run("dpg", *arguments)
    folder = tmp_path / model.name
    grid = folder / "images" / "0.png"
    before = grid.read_bytes()
    grid.unlink()
    part = folder / "parts" / "0-2.png"
    part.write_bytes(part.read_bytes()[:40])
    run("dpg", *arguments)
    assert grid.read_bytes() == before


def test_other_settings_want_another_folder(files, model, tmp_path):
    arguments = ("--prompts", files["geneval"], "--model", model, *FAST, "--out", tmp_path)
    run("geneval", *arguments, "--num-images", 2)
    kept = sorted(path.name for path in tmp_path.rglob("*.png"))
    for options, name in (
        (("--num-images", 1), "samples 2, where 1"),
        (("--num-images", 2, "--seed", 1), "seed 0, where 1"),
        (("--num-images", 2, "--height", 48), "height 32, where 48"),
    ):
        assert f"holds pictures with {name}" in refused("geneval", *arguments, *options)
    other = ("--prompts", files["compbench"], *arguments[2:])
    assert "holds pictures with benchmark 'GenEval'" in refused("compbench", *other)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == kept


def test_inputs_are_refused(files, model, tmp_path):
    dpg = ("--prompts", files["dpg"], "--model", model, *FAST, "--out", tmp_path)
    assert "must be the same, got 32 and 64" in refused("dpg", *dpg, "--width", 64)
    assert "looks at 4 pictures a prompt at most, got 5" in refused("dpg", *dpg, "--num-images", 5)
    assert "--num-images must be" in refused("dpg", *dpg, "--num-images", 0)
    twice = refused("dpg", *dpg, "--model", model)
    assert "two models would be drawn into the folder 'small'" in twice
    # Before the first model has drawn anything.
    assert "no such file" in refused("dpg", *dpg, "--model", "absent")
    assert not list(tmp_path.iterdir())
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("")
    assert "is not empty and has no manifest.json" in refused("dpg", *dpg)
    (tmp_path / "small" / "manifest.json").write_text("[]")
    assert "manifest.json is no manifest of ours" in refused("dpg", *dpg)


def test_each_model_has_a_folder_inside_of_out(tmp_path, monkeypatch):
    inner = tmp_path / "parent" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    names = folder_names(["..", ".", "../../x/..", "~", "~/flux-dev", "a/b/", "tiny"])
    assert names == ["parent", "inner", tmp_path.name, "somebody", "flux-dev", "b", "tiny"]
    with pytest.raises(UserError, match="^/ has no name that its folder of pictures could have"):
        folder_names(["/"])


def test_a_model_that_computes_otherwise_wants_another_folder(files, model, tmp_path):
    """The weights are the same; the manifest has the fingerprint of the settings too."""
    changed = shutil.copytree(model, tmp_path / "small")
    options = ("--prompts", files["geneval"], "--num-images", 1, *FAST, "--out", tmp_path / "out")
    run("geneval", *options, "--model", changed)
    manifest = json.loads((tmp_path / "out" / "small" / "manifest.json").read_text())
    pipe = FluxPipeline.from_pretrained(changed, dtype="float32")
    assert manifest["fingerprint"] == pipe.fingerprint()
    schedule = changed / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "max_shift": 1.5}))
    assert "holds pictures with fingerprint '" in refused("geneval", *options, "--model", changed)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"seed": ' + "1" * 5000 + "}"])
def test_a_damaged_manifest_is_one_line(files, model, tmp_path, text):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "manifest.json").write_text(text)
    options = ("--num-images", 1, *FAST, "--out", tmp_path)
    told = refused("geneval", "--prompts", files["geneval"], "--model", model, *options)
    assert "manifest.json: not valid JSON: " in told


def test_it_goes_on_where_it_was_killed_at_its_first_write(files, model, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".manifest.json.partial").write_text("{")
    (tmp_path / "small" / ".manifest.json.partial-99999999").write_text("{")
    options = ("--num-images", 1, *FAST, "--out", tmp_path)
    run("geneval", "--prompts", files["geneval"], "--model", model, *options)
    assert json.loads((tmp_path / "small" / "manifest.json").read_text())["complete"]


def command(files, model, out):
    return [
        *(sys.executable, "-m", "flux_jax", "evaluate", "geneval"),
        *("--prompts", str(files["geneval"]), "--model", str(model), "--out", str(out)),
        *("--num-images", "12", "--steps", "4", "--dtype", "fp32", "--quiet"),
    ]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.long
def test_killed_or_shared_it_is_the_same(files, model, tmp_path):
    """One process, one that was killed and run again, and two that shared the work."""
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    run(*command(files, model, whole)[4:])
    expected = contents(whole / "small")
    assert sum(name.endswith(".png") for name in expected) == 3 * 12 + 3

    process = subprocess.Popen(command(files, model, killed), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(killed.rglob("0001.png")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((killed / "small" / "manifest.json").read_text())["complete"]
    assert len(list(killed.rglob("samples/*.png"))) < 3 * 12
    subprocess.run(command(files, model, killed), check=True, stdout=subprocess.DEVNULL)
    assert contents(killed / "small") == expected

    finish(start(command(files, model, shared), 2, 1))
    assert contents(shared / "small") == expected
