"""`python -m flux_jax`: what it writes, prints and refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from convert.engine import convert
from flux_jax import compare as comparison
from flux_jax import images
from flux_jax.assets import DEFAULT_MODEL, shipped_path
from flux_jax.cli import app, common
from flux_jax.errors import UserError
from flux_jax.loading import check_request
from flux_jax.metadata import read_png, save_png
from tests.small_pipeline import small_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("cli") / "model")


def run(*arguments: object, code: int = 0):
    """The command's result, with the exit code that was expected."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def draw(folder, out, *arguments, code: int = 0):
    model = ("--model", folder, "--steps", 2, "--dtype", "fp32")
    return run("generate", *arguments, *model, "--out", out, code=code)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def only_line(result) -> str:
    """What a refusal prints: nothing on stdout and one line on stderr."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# -- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "--steps must be a whole number from 1"),
        (["--guidance", "nan"], "--guidance must be a finite number"),
        (["--num-images", 0], "--num-images must be a whole number"),
        (["--num-images", 5_000_000_000], "5000000000 images are too many for one call"),
        (["--batch-size", -1], "--batch-size must be a whole number"),
        (["--negative", "\udcff", "--true-cfg", 2], "--negative must be text in UTF-8"),
        (["\udcff"], "PROMPT must be text in UTF-8, got '\\udcff'"),
        (["--model", ""], "the path of the checkpoint is empty"),
    ],
)
def test_an_option_is_named_as_it_was_given(folder, tmp_path, options, message):
    model = [] if "--model" in options else ["--model", folder]
    result = run("generate", "a cube", *model, *options, "--out", tmp_path / "a.png", code=2)
    assert message in only_line(result)


def test_a_batch_is_no_larger_than_what_is_drawn(folder, tmp_path):
    """The rest of it would be filled up with the last image, and drawn."""
    out = tmp_path / "image.png"
    draw(folder, out, "a red circle", "--num-images", 2, "--seed", 0, "--batch-size", 10**9)
    assert read_png(tmp_path / "image-1.png").batch_size == 2
    # Drawn again alone, it is drawn as it was: rounding depends on it.
    run("generate", "--replay", tmp_path / "image-1.png", "--out", out)
    assert read_png(out).batch_size == 2
    np.testing.assert_array_equal(pixels(out), pixels(tmp_path / "image-1.png"))


def test_generate_writes_an_image_with_its_record(folder, tmp_path):
    out = tmp_path / "image.png"
    result = draw(folder, out, "a red circle", "--seed", 3, "--width", 48)
    assert result.stdout == f"{out}  seed 3\n"
    assert "2/2" in result.stderr
    assert pixels(out).shape == (32, 48, 3)
    record = read_png(out)
    assert (record.prompt, record.seed, record.num_inference_steps) == ("a red circle", 3, 2)
    assert (record.model, record.dtype) == (str(folder), "float32")
    assert len(record.fingerprint) == 16


def test_replay_draws_the_same_image(folder, tmp_path):
    first, again, other = (tmp_path / name for name in ("first.png", "again.png", "other.png"))
    options = ("--negative", "a cube", "--true-cfg", 2, "--height", 16, "--guidance", 2.5)
    draw(folder, first, "a red circle", "--seed", 5, *options)
    run("generate", "--replay", first, "--out", again)
    np.testing.assert_array_equal(pixels(again), pixels(first))
    assert read_png(again) == read_png(first)
    # An option given beside it changes what it names and nothing else.
    run("generate", "--replay", first, "--out", other, "--seed", 6)
    assert not np.array_equal(pixels(other), pixels(first))
    assert read_png(other).true_cfg_scale == 2.0


def test_replay_of_one_image_of_several(folder, tmp_path):
    draw(folder, tmp_path / "all.png", "a red circle", "the cube", "--num-images", 2, "--seed", 0)
    names = [f"all-{i}.png" for i in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [read_png(tmp_path / name).seed for name in names] == [0, 1, 2, 3]
    run("generate", "--replay", tmp_path / "all-3.png", "--out", tmp_path / "again.png")
    np.testing.assert_array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "all-3.png"))


def test_replay_on_a_mesh_draws_as_many_together_on_a_device(folder, tmp_path):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    draw(folder, first, "a red circle", "--seed", 5)
    run("generate", "--replay", first, "--out", again, "--mesh", "data=2")
    np.testing.assert_array_equal(pixels(again), pixels(first))
    assert read_png(again) == read_png(first)
    run("generate", "--replay", first, "--out", again, "--mesh", "data=2", "--batch-size", 4)
    assert read_png(again).batch_size == 2


def test_a_converted_checkpoint_draws_the_same_image(folder, tmp_path):
    convert(folder, tmp_path / "flax")
    records = []
    for model, name in ((folder, "one.png"), (tmp_path / "flax", "two.png")):
        draw(model, tmp_path / name, "a red circle", "--seed", 5)
        records.append(read_png(tmp_path / name))
    np.testing.assert_array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png"))
    assert records[0].fingerprint == records[1].fingerprint


@pytest.mark.parametrize(
    ("option", "named"), [("--model", "rounded"), ("--lora", "style.safetensors:0.5")]
)
def test_replay_from_another_folder_says_what_the_image_names(folder, tmp_path, option, named):
    """A relative path in a record is of the folder that the image was drawn from."""
    out = tmp_path / "image.png"
    draw(folder, out, "a red circle", "--seed", 5)
    changes = {"model": named} if option == "--model" else {"loras": (named,)}
    save_png(Image.open(out), out, dataclasses.replace(read_png(out), **changes))
    message = only_line(run("generate", "--replay", out, "--out", tmp_path / "b.png", code=2))
    told = f"{out} names {named!r}, which is no path from here: give {option} with its path"
    assert message == f"error: {told}"


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model", "someone/model"),
        ("--lora", "someone/lora"),
        ("--lora", "someone/lora/file.safetensors:0.5"),
    ],
)
def test_replay_downloads_nothing_that_only_the_image_names(
    folder, tmp_path, monkeypatch, option, named
):
    """It may be a stranger's."""
    asked = []

    def download(name, *args, **kwargs):
        asked.append(name)
        raise UserError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "image.png"
    draw(folder, out, "a red circle", "--seed", 5)
    changes = {"model": named} if option == "--model" else {"loras": (named,)}
    save_png(Image.open(out), out, dataclasses.replace(read_png(out), **changes))
    message = only_line(run("generate", "--replay", out, "--out", tmp_path / "b.png", code=2))
    assert f"names {named!r}, which is no path from here and not in the hub's cache" in message
    remedy = f"give {option} with its path, or, if it is on the hub, {option} {named}"
    assert message.endswith(remedy)
    assert asked == []
    # Asked for, or there already, it is looked up as ever.
    run("generate", "--replay", out, "--out", tmp_path / "b.png", option, named, code=2)
    repository = "--".join(["models", *named.split("/")[:2]])
    (tmp_path / "cache" / repository / "snapshots").mkdir(parents=True)
    run("generate", "--replay", out, "--out", tmp_path / "b.png", code=2)
    assert len(asked) == 2


def test_replay_says_when_the_weights_are_others(folder, tmp_path, caplog):
    out = tmp_path / "image.png"
    draw(folder, out, "a red circle", "--seed", 5)
    record = read_png(out)
    save_png(Image.open(out), out, record.__class__(**{**vars(record), "fingerprint": "0" * 16}))
    caplog.clear()
    run("generate", "--replay", out, "--out", tmp_path / "again.png")
    assert f"other weights (fingerprint {'0' * 16}, here {record.fingerprint})" in caplog.text


def test_replay_takes_the_attention_that_drew_the_image(folder, tmp_path, caplog):
    out, again = tmp_path / "image.png", tmp_path / "again.png"
    draw(folder, out, "a red circle", "--seed", 5)
    record = read_png(out)
    save_png(Image.open(out), out, dataclasses.replace(record, attention="xla_fp8"))
    run("generate", "--replay", out, "--out", again)
    assert read_png(again).attention == "xla_fp8"
    assert not np.array_equal(pixels(again), pixels(out))
    save_png(Image.open(out), out, dataclasses.replace(record, attention="cudnn"))
    caplog.clear()
    run("generate", "--replay", out, "--out", again)
    assert f"{out} was drawn by other kernels: attention='cudnn' cannot run here" in caplog.text
    assert read_png(again) == record


def test_a_hub_model_is_drawn_at_a_revision(folder, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    inputs = ("--revision", "0123abc", "--seed", 5)
    draw("owner/name", tmp_path / "one.png", "a red circle", *inputs)
    draw("owner/name", tmp_path / "many", "--prompts", prompts, *inputs)
    assert asked == [("owner/name", "0123abc")] * 2
    assert read_png(tmp_path / "many" / "00000.png").model == "owner/name"
    message = "a local path has no revision 'v1'"
    out = tmp_path / "two.png"
    assert message in only_line(draw(folder, out, "a cube", "--revision", "v1", code=2))


def test_a_negative_prompt_without_effect_is_told(folder, tmp_path, caplog):
    caplog.clear()
    draw(folder, tmp_path / "image.png", "a cube", "--seed", 1, "--negative", "a star")
    assert "--negative has no effect without --true-cfg above 1" in caplog.text
    assert read_png(tmp_path / "image.png").negative_prompt is None
    caplog.clear()
    draw(folder, tmp_path / "image.png", "a cube", "--seed", 1, "--true-cfg", 2)
    assert "--true-cfg has no effect without --negative" in caplog.text


def test_replay_says_when_the_decoder_took_another_way(folder, tmp_path, monkeypatch, caplog):
    """Free memory decides, if nobody does."""
    whole, tiled, again = (tmp_path / name for name in ("whole.png", "tiled.png", "again.png"))
    draw(folder, whole, "a red circle", "--seed", 5)
    assert read_png(whole).tiled is None
    with monkeypatch.context() as short:
        short.setattr(images, "device_memory", lambda _: (2**30, 0))
        run("generate", "--replay", whole, "--out", tiled)
        said = f"{whole} was decoded whole, here in tiles: the image will differ slightly"
        assert said in caplog.text
        assert read_png(tiled).tiled is True
        caplog.clear()
        run("generate", "--replay", tiled, "--out", again)
        run("generate", "--replay", tiled, "--out", again, "--height", 48)
        assert "was decoded" not in caplog.text
    run("generate", "--replay", tiled, "--out", again)
    assert f"{tiled} was decoded in tiles, here whole" in caplog.text
    assert again.read_bytes() == whole.read_bytes()


def test_json_quiet_and_no_metadata(folder, tmp_path):
    out = tmp_path / "image.png"
    result = draw(folder, out, "a cube", "--seed", 1, "--json", "--quiet", "--no-metadata")
    report = json.loads(result.stdout)
    assert report["images"] == [{"file": str(out), "prompt": "a cube", "seed": 1}]
    assert set(report["seconds"]) == {"load and encode", "draw"}
    assert result.stderr == ""
    with Image.open(out) as image:
        assert image.info == {}


def test_a_seed_is_drawn_and_reported(folder, tmp_path):
    result = draw(folder, tmp_path / "image.png", "a cube")
    assert result.stdout.split()[-1] == str(read_png(tmp_path / "image.png").seed)


def test_modulation_weights_that_wait_on_the_host_change_nothing(folder, tmp_path):
    draw(folder, tmp_path / "a.png", "a red circle", "--seed", 3)
    draw(folder, tmp_path / "b.png", "a red circle", "--seed", 3, "--offload-modulation")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a PROMPT to draw, or --replay"),
        (("a", "--height", 40), "--height must be a multiple of 16 pixels, got 40"),
        (("a", "--steps", 0), "--steps must be a whole number from 1 to 10000, got 0"),
        (("a", "--out", "image.jpg"), "image.jpg must end in .png"),
        (("a", "--out", "absent/image.png"), "absent does not exist"),
        (("a", "--dtype", "int8"), "--dtype must be bf16 or fp32, got int8"),
        (("a", "--model", "/absent/model"), "/absent/model"),
        (("--replay", "absent.png"), "absent.png does not exist"),
    ],
)
def test_refusals(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    model = () if "--model" in arguments else ("--model", folder)
    assert message in only_line(run("generate", *arguments, *model, code=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/proc/image.png", f"{'x' * 300}.png"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_and_encode", lambda *args, **settings: pytest.fail("loaded"))
    message = only_line(run("generate", "a", "--out", out, code=2))
    assert f"--out {out}: cannot be written" in message
    assert list(tmp_path.iterdir()) == []


# -- evaluate ------------------------------------------------------------------------------------


def test_evaluate(folder, tmp_path):
    arguments = ("evaluate", "--model", folder, "--out", tmp_path, "--limit", 1, "--steps", 1)
    result = run(*arguments, "--dtype", "fp32", "--batch-size", 6)
    assert result.stdout.startswith("| category")
    assert "overall" in result.stdout
    assert len(list(tmp_path.glob("*.png"))) == 6
    report = json.loads(run(*arguments, "--dtype", "fp32", "--json", "--quiet").stdout)
    assert report["model"] == str(folder)
    assert report["images"] == json.loads((tmp_path / "report.json").read_text())["images"]
    other = (*arguments, "--dtype", "fp32", "--seed", 1)
    refused = only_line(run(*other, "--quiet", code=2))
    assert "0000.png is there with seed 0, where 1 is asked for" in refused
    assert "choose another folder" in refused
    assert read_png(tmp_path / "0000.png").seed == 0
    run(*other, "--force", "--quiet")
    assert read_png(tmp_path / "0000.png").seed == 1
    assert "at least 1 prompt" in only_line(run("evaluate", "--limit", 0, code=2))
    assert "at least 1 prompt" in only_line(run("evaluate", "composition", "--limit", 0, code=2))
    assert "No such command 'geneva'" in run("evaluate", "geneva", code=2).stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("evaluate", "--steps", 0), "--steps must be a whole number from 1"),
        (("evaluate", "--limit", 0), "--limit must be at least 1 prompt"),
        (("compare", "--steps", 0), "--steps must be at least 1, got 0"),
        (("demo", "--seed", -1), "--seed must be a whole number"),
        (("info", "--memory", "--batch-size", 0), "--batch-size must be a whole number"),
        (("info", "--memory", "--text-encoders", "x"), "--text-encoders must be one of"),
    ],
)
def test_other_commands_name_their_options_too(folder, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "check_installed", lambda: None)
    name, *options = command
    model = ("--model", folder) if name == "evaluate" else (folder,) if name != "demo" else ()
    assert message in only_line(run(name, *options, *model, code=2))
    assert not list(tmp_path.iterdir())


def test_compare_wants_a_whole_pipeline(folder, tmp_path, monkeypatch):
    """Told before anything is loaded."""
    for part in folder.iterdir():
        if part.name != "tokenizer":
            (tmp_path / part.name).symlink_to(part)
    monkeypatch.setattr(comparison, "check_installed", lambda: None)
    monkeypatch.setattr(comparison, "load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    line = only_line(run("compare", tmp_path, code=2))
    assert f"{tmp_path} is no whole pipeline: it has no tokenizer" in line


# -- info ----------------------------------------------------------------------------------------


def test_info(folder):
    report = json.loads(run("info", folder, "--json").stdout)
    parts = report["components"]
    assert set(parts) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert report["parameters"] == sum(part["parameters"] for part in parts.values())
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    # Headers aside.
    assert 0.5 * stored < report["bytes"] < stored
    assert parts["transformer"]["dtypes"] == ["bfloat16"]
    assert report["scheduler"]["max_shift"] == 1.25
    text = run("info", folder).stdout
    assert f"{report['parameters']:,}" in text
    assert "transformer: in_channels=16" in text
    assert "tokenizers: tokenizer, tokenizer_2" in text


def test_a_folder_comes_before_the_shipped_model_of_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = json.loads(run("info", "tiny", "--json").stdout)
    # One that holds no checkpoint is not meant, as `evaluate geneval --out .` makes it.
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "manifest.json").write_text("{}")
    assert json.loads(run("info", "tiny", "--json").stdout) == shipped
    (tmp_path / "tiny" / "manifest.json").unlink()
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").symlink_to(folder)
    found = json.loads(run("info", "tiny", "--json").stdout)
    assert found["path"] == "tiny"
    assert found["parameters"] < shipped["parameters"]


def test_where_no_model_is_named_it_is_the_shipped_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = run("info", "--json").stdout
    (tmp_path / DEFAULT_MODEL).symlink_to(folder)
    assert run("info", "--json").stdout == shipped
    request = check_request(None, {}, images=1, num_images_per_prompt=1)
    assert (request.name, request.path) == (DEFAULT_MODEL, shipped_path(DEFAULT_MODEL))
    run("generate", "a red circle", "--steps", 1, "--quiet")
    record = read_png(tmp_path / "image.png")
    assert (record.model, record.height) == (DEFAULT_MODEL, 128)


def test_info_tells_the_memory(folder):
    arguments = ("info", folder, "--memory", "--width", 64)
    memory = json.loads(run(*arguments, "--json").stdout)["memory"]
    assert (memory["height"], memory["width"]) == (32, 64)
    for need in memory["stages"].values():
        assert need["peak"] == need["weights"] + need["work"] + need["held"]
    assert memory["peak"] == max(need["peak"] for need in memory["stages"].values())
    text = run(*arguments).stdout
    assert f"{memory['stages']['denoise']['peak'] / 1e6:,.1f}" in text
    assert f"largest{memory['peak'] / 1e6:57,.1f}" in text
    choices = ("--text-encoders", "resident", "--offload-modulation", "--tiled")
    other = json.loads(run(*arguments, *choices, "--json").stdout)["memory"]["stages"]
    # T5 and CLIP stay; a quarter of the transformer goes.
    assert other["denoise"]["held"] > memory["stages"]["denoise"]["held"]
    assert other["denoise"]["weights"] < memory["stages"]["denoise"]["weights"]
    failed = run(*arguments, "--text-encoders", "auto", code=2).stderr
    assert "--text-encoders must be one of resident, offloaded, streamed, got 'auto'" in failed


@pytest.mark.parametrize(
    "option", [("--height", 64), ("--batch-size", 2), ("--dtype", "fp32"), ("--tiled",)]
)
def test_what_is_for_the_memory_needs_it(folder, option):
    assert f"{option[0]} goes with --memory" in only_line(run("info", folder, *option, code=2))


# -- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "info",
        "compare",
        *(f"evaluate {name}" for name in ("composition", "geneval", "compbench", "dpg")),
    ],
)
def test_help_has_examples(command):
    text = run(*command.split(), "--help").stdout
    assert f"python -m flux_jax {command}" in text
    assert "--json" in text


def test_starting_imports_nothing_heavy():
    code = (
        "import sys, flux_jax, flux_jax.cli; "
        "print([m for m in ('jax', 'torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_importing_the_pipeline_leaves_transformers_and_torch_alone():
    code = (
        "import sys, flux_jax.pipeline; "
        "print([m for m in ('torch', 'transformers', 'diffusers', 'convert') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_another_process_draws_the_same_image(folder, tmp_path):
    draw(folder, tmp_path / "here.png", "a red circle", "--seed", 3)
    arguments = ["generate", "a red circle", "--seed", "3", "--steps", "2", "--dtype", "fp32"]
    paths = ["--model", str(folder), "--out", str(tmp_path / "there.png")]
    subprocess.run([sys.executable, "-m", "flux_jax", *arguments, *paths], check=True)
    np.testing.assert_array_equal(pixels(tmp_path / "there.png"), pixels(tmp_path / "here.png"))


def test_no_traceback_in_a_real_process(folder):
    arguments = ["generate", "a", "--model", str(folder), "--width", "33"]
    command = [sys.executable, "-m", "flux_jax", *arguments]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr.startswith("error: --width must be a multiple of 16 pixels, got 33")
    assert "Traceback" not in shown.stderr
