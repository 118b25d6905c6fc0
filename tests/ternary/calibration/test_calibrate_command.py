"""`python -m ternary calibrate` on a whole pipeline, and what it survives."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from convert.replaceable import check_target
from flux_jax.errors import UserError
from flux_jax.files import claimed
from flux_jax.linears import linears
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompts import TextEncoders
from flux_jax.tree import split_flat, to_flat
from ternary.calibration import run as run_module
from ternary.calibration.run import calibrate_checkpoint, encode_prompts, image_grid
from ternary.cli import app
from ternary.commands.calibrate import parse_blocks
from ternary.config import CalibrateConfig, QuantConfig
from ternary.distillation.step import PromptSet
from ternary.layers import FakeTernaryLinear, TernaryLinear
from ternary.policy import Policy
from ternary.storage.checkpoint import open_checkpoint
from ternary.storage.latents import load_latents
from ternary.student import make_student
from tests.small_pipeline import small_folder
from tests.ternary.teacher_files import negate_tensor

pytestmark = pytest.mark.slow

OPTIONS = "--samples 12 --states-each 3 --sampling-steps 4 --batch-size 4 --steps 60".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_folder(place / "teacher")
    (place / "prompts.txt").write_text("a red circle\nthe blue cube above a star\n\n")
    return place


def arguments(folder, out, *more):
    places = ("--teacher", folder / "teacher", "--prompts", folder / "prompts.txt", "--out", out)
    return [str(a) for a in ("calibrate", *places, *OPTIONS, *more)]


@pytest.fixture(scope="module")
def made(folder):
    result = CliRunner().invoke(app, arguments(folder, folder / "whole"))
    return folder / "whole", result


def test_the_command_makes_a_pipeline_that_draws(folder, made):
    out, result = made
    assert result.exit_code == 0, result.stderr
    losses = re.findall(r"blocks.0: loss (\S+) -> (\S+) in", result.stderr)
    assert len(losses) == 2
    assert all(float(after) < float(before) for before, after in losses)
    assert "parameters are ternary" in result.stdout
    # Every stage has its bar.
    bars = ["prompts", "weights", "trajectories", "double_blocks.0", "single_blocks.0"]
    places = [result.stderr.find(f"{bar}:") for bar in bars]
    assert -1 not in places
    assert places == sorted(places)
    pipe = FluxPipeline.from_pretrained(out)
    assert isinstance(pipe.transformer.double_blocks[0].img_mod.lin, TernaryLinear)
    images = pipe("a red circle", num_inference_steps=2, seed=0, output_type="np").images
    assert np.isfinite(np.asarray(images)).all()
    assert not (folder / "whole.calibration").exists()


def test_texts_give_the_commands_checkpoint(folder, made):
    config = CalibrateConfig(samples=12, states_each=3, sampling_steps=4, batch_size=4, steps=60)
    texts, out = ["a red circle", "the blue cube above a star"], folder / "from_python"
    what = QuantConfig(), Policy(), config
    calibrate_checkpoint(str(folder / "teacher"), str(out), texts, *what, latents=False)
    one, other = (path / "transformer" / "ternary.safetensors" for path in (made[0], out))
    assert one.read_bytes() == other.read_bytes()


def test_embeddings_of_the_pipeline_are_prompts(folder):
    embeds = PromptEmbeds(
        prompts=("a red circle",),
        prompt_embeds=jnp.zeros((1, 12, 5)),
        pooled_prompt_embeds=jnp.zeros((1, 4)),
    )
    what = QuantConfig(), Policy(), CalibrateConfig()
    for prompts, message in ((embeds, "prompts have widths 5 and 4"), ([], "a non-empty list")):
        with pytest.raises(UserError, match=message):
            calibrate_checkpoint(folder / "teacher", folder / "no", prompts, *what, grid=(2, 2))
    # As a division by 16 makes it.
    for grid, message in (((2.0, 2), "a whole number of at least 1, got 2.0"), ((2, 0), "got 0")):
        with pytest.raises(UserError, match=f"a side of the grid must be .*{message}"):
            # Without the tests' own check of types.
            inspect.unwrap(calibrate_checkpoint)(
                folder / "teacher", folder / "no", ["a red circle"], *what, grid=grid
            )
    assert not list(folder.glob("no*"))


def test_the_latents_are_those_of_the_checkpoint(folder, made):
    """A student of the teacher takes them, and freezes to what was saved."""
    out, _ = made
    latents, quant, policy = load_latents(out)
    assert (quant, policy) == (QuantConfig(), Policy())
    pipe = FluxPipeline.from_pretrained(folder / "teacher")
    student = make_student(pipe.transformer, quant, policy)
    rebuild, flat = split_flat(student)
    assert set(latents) == set(flat)
    assert {latents[name].dtype for name in latents} == {np.dtype(np.float32)}
    student = rebuild({name: jnp.asarray(latents[name]) for name in latents})
    with open_checkpoint(out) as checkpoint:
        loaded = checkpoint.load_module(jnp.bfloat16)
    packed = linears(loaded, TernaryLinear)
    found = linears(student, FakeTernaryLinear)
    assert packed.keys() == found.keys()
    for name, layer in found.items():
        for field, value in to_flat(layer.freeze()).items():
            stored = to_flat(packed[name])[field]
            np.testing.assert_array_equal(np.asarray(value), np.asarray(stored), err_msg=name)


@pytest.mark.long
def test_a_killed_run_gives_the_same_checkpoint(folder, made):
    out = folder / "killed"
    command = [sys.executable, "-m", "ternary", *arguments(folder, out, "--quiet")]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE)
    finished = Path(f"{out}.calibration") / "double_blocks.0.json"
    deadline = time.monotonic() + 300
    while not finished.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert finished.exists()
    assert not finished.with_name("single_blocks.0.json").exists()
    assert not out.exists()
    result = CliRunner().invoke(app, arguments(folder, out))
    assert result.exit_code == 0, result.stderr
    one, other = (path / "transformer" / "ternary.safetensors" for path in (made[0], out))
    assert one.read_bytes() == other.read_bytes()
    one, other = (json.loads((p / "latents" / "latents.json").read_text()) for p in (made[0], out))
    assert one == other


def test_a_part_of_the_blocks_without_latents(folder):
    out = folder / "some"
    more = ("--blocks", "single_blocks.0", "--no-latents", "--quiet", "--steps", "2")
    result = CliRunner().invoke(app, arguments(folder, out, *more))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert not (out / "latents").exists()
    with open_checkpoint(out) as checkpoint:
        assert {layer.split(".")[0] for layer in checkpoint.layers} == {
            "double_blocks",
            "single_blocks",
        }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--include", "nothing.*"), "include pattern 'nothing.*' matches none"),
        (("--blocks", "single_blocks.9"), "'single_blocks.9' is no part with ternary linears"),
        (("--blocks", "3"), "blocks must be at most 2"),
        (("--height", "33"), "height must be a multiple of"),
        (("--accumulate", "3"), "accumulate must divide batch_size"),
        (("--compute-dtype", "float16"), "compute_dtype must be one of float32, bfloat16"),
        (("--rank", "999"), "rank must be at most"),
    ],
)
def test_the_command_refuses(folder, monkeypatch, more, message):
    """Before the text encoders, which are large, are read."""

    def refuse(*arguments, **options):
        raise AssertionError("the text encoders were loaded")

    monkeypatch.setattr(TextEncoders, "from_pretrained", refuse)
    result = CliRunner().invoke(app, arguments(folder, folder / "refused", "--quiet", *more))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (folder / "refused").exists()


def test_a_teacher_without_a_transformer_is_one_line(folder, tmp_path):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / "transformer")
    index = tmp_path / "teacher" / "model_index.json"
    content = json.loads(index.read_text())
    del content["transformer"]
    index.write_text(json.dumps(content))
    shutil.copy(folder / "prompts.txt", tmp_path)
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"error: .*teacher: has no transformer; it has .*vae.*\n", result.stderr)
    with pytest.raises(UserError, match="teacher has no transformer"):
        encode_prompts(tmp_path / "teacher", ["a star"])


def test_a_run_at_work_is_left_alone(folder):
    """Another call, with other settings even, neither joins in nor changes what is there."""
    out = folder / "claimed"
    place = Path(f"{out}.calibration")
    place.mkdir()
    (place / "progress.json").write_text("{}")
    with claimed(place):
        result = CliRunner().invoke(app, arguments(folder, out, "--quiet", "--seed", "5"))
    assert result.exit_code == 2
    assert result.stderr == f"error: {place}: another run is at work here; wait for it\n"
    assert (place / "progress.json").read_text() == "{}"
    assert not out.exists()


def test_a_target_that_is_there_is_refused_before_any_work(folder, made):
    result = CliRunner().invoke(app, arguments(folder, made[0]))
    assert result.exit_code == 2
    assert "exists already; --force replaces it" in result.stderr
    # What it wrote itself, latent weights and all, it may replace.
    assert (made[0] / "latents").is_dir()
    check_target(made[0], force=True)


def test_a_teacher_is_not_replaced_by_its_student(folder, tmp_path):
    teacher = shutil.copytree(folder / "teacher", tmp_path / "teacher")
    shutil.copy(folder / "prompts.txt", tmp_path)
    before = sorted(path.stat().st_mtime_ns for path in teacher.rglob("*"))
    result = CliRunner().invoke(app, arguments(tmp_path, teacher, "--force"))
    assert result.exit_code == 2
    assert "the target would replace the source" in result.stderr
    assert sorted(path.stat().st_mtime_ns for path in teacher.rglob("*")) == before
    assert not Path(f"{teacher}.calibration").exists()


def test_prompts_are_encoded_as_the_pipeline_does(folder):
    texts = [f"a {colour} cube" for colour in ("red", "blue", "green")] * 3
    found = encode_prompts(folder / "teacher", texts)
    encoders = TextEncoders.from_pretrained(folder / "teacher", placement="resident")
    expected = encoders.encode(texts)
    np.testing.assert_array_equal(found.txt, np.asarray(expected.prompt_embeds))
    np.testing.assert_array_equal(found.pooled, np.asarray(expected.pooled_prompt_embeds))
    assert image_grid(folder / "teacher") == (2, 2)
    assert image_grid(folder / "teacher", 32, 64) == (2, 4)


@pytest.mark.parametrize(
    ("text", "blocks"), [(None, None), ("2", 2), ("²", ("²",)), ("a.0, b.1", ("a.0", "b.1"))]
)
def test_blocks_on_the_command_line(text, blocks):
    assert parse_blocks(text) == blocks


def test_blocks_on_the_command_line_are_refused():
    with pytest.raises(UserError, match="--blocks must be a number or names of blocks, got ','"):
        parse_blocks(",")


def stop_before_the_end(folder, out, *more):
    """A call that is interrupted when all blocks are done."""
    staged = run_module.staged_folder

    @contextlib.contextmanager
    def killed(*given, **named):
        with staged(*given, **named):
            raise KeyboardInterrupt
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "staged_folder", killed)
        assert CliRunner().invoke(app, arguments(folder, out, *more)).exit_code != 0
    assert Path(f"{out}.calibration").is_dir()


def test_a_call_does_not_go_on_with_another_teacher(folder, tmp_path):
    """Neither with other attention values, as of a merged LoRA, nor with other text encoders."""
    shutil.copytree(
        folder, tmp_path / "f", ignore=shutil.ignore_patterns("whole*", "*.calibration")
    )
    teacher, out = tmp_path / "f" / "teacher", tmp_path / "out"
    more = ("--quiet", "--steps", "2")
    stop_before_the_end(tmp_path / "f", out, *more)
    for component, tensor in (
        ("transformer", "transformer_blocks.0.attn.to_v.weight"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.v.weight"),
    ):
        negate_tensor(teacher / component, tensor)
        result = CliRunner().invoke(app, arguments(tmp_path / "f", out, *more))
        assert result.exit_code == 2
        assert "belongs to another calibration, with teacher_crc32" in result.stderr
        assert result.stderr.count("\n") == 1
        negate_tensor(teacher / component, tensor)
    result = CliRunner().invoke(app, arguments(tmp_path / "f", out, *more))
    assert result.exit_code == 0, result.stderr


def test_a_call_goes_on_where_prompts_are_encoded_to_other_bits(folder, tmp_path, monkeypatch):
    """As another machine rounds them: they are known again by their texts."""
    out = tmp_path / "out"
    calls = []

    def encoded(*given, **named):
        found = encode_prompts(*given, **named)
        calls.append(1)
        off = np.float32(1e-3 * len(calls))
        return PromptSet(*(np.asarray(part, np.float32) + off for part in found))

    monkeypatch.setattr(run_module, "encode_prompts", encoded)
    stop_before_the_end(folder, out)
    result = CliRunner().invoke(app, arguments(folder, out))
    assert result.exit_code == 0, result.stderr
    assert len(calls) == 2
    # Every block was finished by the first call.
    assert "blocks.0: loss" not in result.stderr
