"""A distillation run: complete, resumable to the bit, and clear about what stops it."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from typer.testing import CliRunner

from flux_jax.errors import UserError
from flux_jax.files import claimed
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompts import TextEncoders
from flux_jax.tree import to_flat
from ternary.cli import app
from ternary.distillation.held_out import HeldOut
from ternary.distillation.optimizer import learning_rate
from ternary.distillation.prompt_feed import PromptFeed
from ternary.distillation.run import distill
from ternary.distillation.run_config import RunConfig, read_run_config
from ternary.distillation.run_log import RunLog
from ternary.distillation.step import StepFunction
from ternary.distillation.task import Task, open_folder, split_prompts
from ternary.student import make_student
from tests.jobs import with_devices
from tests.small_pipeline import WORDS, small_folder
from tests.ternary.latents_folder import write_latents

pytestmark = pytest.mark.slow

PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in WORDS[6:10]]
SETTINGS = """
distill: {steps: 9, learning_rate: 2e-3, warmup: 1, compute_dtype: float32}
trajectory: {sampling_steps: [3, 4], groups: 2}
batch_size: 8
held_out: 2
sampling_steps: 2
sample_every: 4
checkpoint_every: 3
log_every: 2
"""


def one_device():
    return Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("teacher") / "m")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "run.yaml"
    path.write_text(SETTINGS)
    return path


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses(out):
    rows = rows_of(out / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(teacher, prompts, settings, tmp_path_factory):
    """A run that nothing disturbed, and how it ended."""
    out = tmp_path_factory.mktemp("run") / "run"
    task = Task(teacher=str(teacher), prompts=prompts)
    outcome = distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)
    return out, outcome


def test_a_run_leaves_all_that_it_promises(whole):
    out, outcome = whole
    assert outcome.steps == 9
    assert len(losses(out)) == 9
    drawn = rows_of(out / "held_out.csv")
    # Held-out prompts are drawn from step 0 on.
    assert [int(row["step"]) for row in drawn] == [0, 4, 8, 9]
    assert float(drawn[-1]["median_psnr_db"]) == pytest.approx(outcome.median_psnr, abs=1e-3)
    assert float(drawn[0]["median_psnr_db"]) < 99
    with Image.open(out / "samples" / "step_000009.png") as picture:
        # Two pairs of 32 x 32, four to a row: 2 pixels inside a pair, 6 between two.
        assert picture.size == (4 * (66 + 6) - 6, 32)
    legend = json.loads((out / "samples" / "step_000009.json").read_text())
    assert [pair["prompt"] for pair in legend["shown"]] == [PROMPTS[0], PROMPTS[-1]]
    assert [pair["seed"] for pair in legend["shown"]] == [0, 1]
    assert (legend["height"], legend["width"], legend["gap"]) == (32, 32, 2)
    assert list((out / "tensorboard").glob("events.*"))
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [6, 9]


def test_the_student_is_a_pipeline_and_draws_what_was_reported(whole, teacher):
    out, outcome = whole
    held_out = [PROMPTS[0], PROMPTS[-1]]
    encoders = TextEncoders.from_pretrained(teacher)
    embeds = encoders.encode(held_out, max_sequence_length=12)
    images = []
    for folder in (teacher, out / "student"):
        pipe = FluxPipeline.from_pretrained(folder, dtype="float32", text_encoders=encoders)
        drawn = pipe(embeds, seed=[0, 1], num_inference_steps=2, output_type="np", progress=False)
        images.append(np.asarray(drawn.images, np.float64))
    error = np.mean((images[0] - images[1]) ** 2, axis=(1, 2, 3))
    # What is not ternary was float32 in training, and is stored in bf16.
    assert np.median(-10 * np.log10(error)) == pytest.approx(outcome.median_psnr, abs=0.3)


def test_a_run_has_a_page(whole, tmp_path):
    """`report` reads what a run really writes, every part of it."""
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(whole[0]), "--out", str(page), "--quiet"])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "Finished: 9 steps." in text
    assert "Not in this report" not in text
    assert text.count('class="pair"') == 2
    assert f"{whole[1].median_psnr:.1f} dB" in text


def test_held_out_prompts_are_never_trained_on(prompts):
    split = split_prompts(Task(teacher="", prompts=prompts), RunConfig(held_out=3))
    assert len(split.held_out) == 3
    assert sorted(split.train + split.held_out) == sorted(PROMPTS)
    other = prompts.parent / "held_out.txt"
    other.write_text("\n".join([PROMPTS[1], "a red star"]))
    task = Task(teacher="", prompts=prompts, held_out=str(other))
    assert PROMPTS[1] not in split_prompts(task, RunConfig()).train


def command(teacher, prompts, settings, out):
    return [
        *(sys.executable, "-m", "ternary", "distill", "--quiet"),
        *("--teacher", str(teacher), "--prompts", str(prompts)),
        *("--config", str(settings), "--out", str(out)),
    ]


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(teacher, prompts, settings, whole, tmp_path):
    """Killed in the middle of things, then run again: the losses are those of the whole run."""
    out = tmp_path / "run"
    run = command(teacher, prompts, settings, out)
    process = subprocess.Popen(run, env=with_devices(1))
    deadline = time.monotonic() + 300
    # After the first checkpoint is complete and before the run is.
    while not (out / "checkpoints" / "3").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "student").exists()
    subprocess.run(run, env=with_devices(1), check=True)
    assert losses(out) == losses(whole[0])
    assert (out / "student" / "transformer" / "ternary.safetensors").read_bytes() == (
        whole[0] / "student" / "transformer" / "ternary.safetensors"
    ).read_bytes()


def test_a_stopped_run_says_where_it_goes_on(
    teacher, prompts, settings, whole, tmp_path, monkeypatch, caplog
):
    out, task = tmp_path / "run", Task(teacher=str(teacher), prompts=prompts)
    config, add = read_run_config(settings, ["log_every=1"]), RunLog.add

    def interrupted(self, rows):
        add(self, rows)
        if rows and rows[-1]["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "add", interrupted)
    caplog.set_level("INFO", "ternary")
    with pytest.raises(KeyboardInterrupt):
        distill(task, out, config, mesh=one_device(), progress=False)
    kept = f"the last good checkpoint is step 3, {(out / 'checkpoints' / '3').resolve()}"
    assert f"stopped; {kept}: give the command again to go on" in caplog.messages
    monkeypatch.setattr(RunLog, "add", add)
    distill(task, out, config, mesh=one_device(), progress=False)
    assert "going on from step 3 of 9" in caplog.messages
    assert losses(out) == losses(whole[0])


def test_the_devices_have_a_step_to_do_while_others_are_reported(
    teacher, prompts, settings, tmp_path, monkeypatch
):
    """All that is taken is reported before a checkpoint alone, or a drawing."""
    begun, behind = [], {}
    give, add = PromptFeed.next, RunLog.add

    def given(self):
        begun.append(give(self))
        return begun[-1]

    def added(self, rows):
        behind[rows[-1]["step"]] = len(begun) - rows[-1]["step"]
        add(self, rows)

    monkeypatch.setattr(PromptFeed, "next", given)
    monkeypatch.setattr(RunLog, "add", added)
    config = read_run_config(settings, ["held_out=0", "checkpoint_every=9"])
    task, out = Task(teacher=str(teacher), prompts=prompts), tmp_path / "run"
    distill(task, out, config, mesh=one_device(), progress=False)
    assert behind == {2: 1, 4: 0, 6: 1, 8: 0, 9: 0}
    assert len(losses(out)) == 9
    rates = [float(row["learning_rate"]) for row in rows_of(out / "metrics.csv")]
    np.testing.assert_allclose(rates, learning_rate(config.distill)(np.arange(9)), rtol=1e-6)


def test_an_interrupt_while_the_tables_are_opened_closes_the_checkpoints(
    teacher, prompts, settings, tmp_path, monkeypatch
):
    def interrupted(self, *given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "__init__", interrupted)
    task, hook = Task(teacher=str(teacher), prompts=prompts), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        distill(
            task, tmp_path / "run", read_run_config(settings), mesh=one_device(), progress=False
        )
    assert sys.unraisablehook is hook


def test_a_drawing_that_a_kill_prevented_is_made(teacher, prompts, settings, whole, tmp_path):
    """Between the last checkpoint and its drawing: what is reported is of the last step."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    table = out / "held_out.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    (out / "samples" / "step_000009.png").unlink()
    task = Task(teacher=str(teacher), prompts=prompts)
    again = distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)
    assert again == dataclasses.replace(whole[1], student=out / "student")
    assert table.read_bytes() == (whole[0] / "held_out.csv").read_bytes()
    assert (out / "samples" / "step_000009.png").exists()


def test_a_run_that_is_finished_draws_nothing(
    teacher, prompts, settings, whole, tmp_path, monkeypatch
):
    """Given again, as when it was killed while it wrote the student: no picture is wanted."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "student")
    monkeypatch.setattr(HeldOut, "draw", lambda *_: pytest.fail("a picture was drawn"))
    task = Task(teacher=str(teacher), prompts=prompts)
    again = distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)
    assert again == dataclasses.replace(whole[1], student=out / "student")
    students = [folder / "student" / "transformer" for folder in (out, whole[0])]
    one, other = ((folder / "ternary.safetensors").read_bytes() for folder in students)
    assert one == other


@pytest.mark.long
def test_a_student_that_was_drawn_leaves_the_device(
    teacher, prompts, settings, tmp_path, monkeypatch
):
    """Though Python's garbage collector does not come by."""
    codes = []
    draw = RunLog.draw

    def listen(self, *arguments):
        # Nothing else of a run is of bytes.
        codes.append(sum(array.dtype == jnp.uint8 for array in jax.live_arrays()))
        draw(self, *arguments)

    monkeypatch.setattr(RunLog, "draw", listen)
    config = read_run_config(settings, ["distill.steps=2", "sample_every=1", "checkpoint_every=2"])
    gc.collect()
    gc.disable()
    try:
        task = Task(teacher=str(teacher), prompts=prompts)
        distill(task, tmp_path / "run", config, mesh=one_device(), progress=False)
    finally:
        gc.enable()
    assert len(codes) == 3
    assert codes[0]
    assert len(set(codes)) == 1


@pytest.mark.long
def test_a_full_disk_loses_nothing_saved(teacher, prompts, settings, whole, tmp_path):
    """No file may grow beyond a limit that only the checkpoints exceed: writing one fails."""
    out = tmp_path / "run"
    task = Task(teacher=str(teacher), prompts=prompts)
    some = read_run_config(settings, ["distill.steps=3"])
    distill(task, out, some, mesh=one_device(), progress=False)
    # The same run, now to nine steps: as if it had been stopped.
    (out / "run.yaml").write_text((whole[0] / "run.yaml").read_text())
    code = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "runpy.run_module('ternary', run_name='__main__', alter_sys=True)\n"
    )
    limited = [sys.executable, "-c", code, *command(teacher, prompts, settings, out)[3:]]
    failed = subprocess.run(limited, env=with_devices(1), capture_output=True, text=True)
    assert failed.returncode == 2, failed.stderr
    assert "a checkpoint could not be written" in failed.stderr
    assert "the last good checkpoint is step 3" in failed.stderr
    distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)
    assert len(losses(out)) == 9


def test_a_loss_that_is_not_finite_stops_the_run(teacher, prompts, settings, tmp_path):
    changes = ["distill.learning_rate=1e30", "distill.warmup=4", "distill.max_grad_norm=1e30"]
    config = read_run_config(settings, [*changes, "checkpoint_every=1"])
    task = Task(teacher=str(teacher), prompts=prompts)
    with pytest.raises(UserError, match=r"loss of step [2-9] is not finite; the last good .* step"):
        distill(task, tmp_path / "run", config, mesh=one_device(), progress=False)


@pytest.mark.long
def test_a_run_starts_from_calibrated_weights(teacher, prompts, settings, whole, tmp_path):
    """From the teacher's own it is the run without a start; from others it is not."""
    config = read_run_config(settings)
    pipe = FluxPipeline.from_pretrained(teacher, dtype="float32")
    flat = to_flat(make_student(pipe.transformer, config.quant, config.policy))
    found = []
    for factor in (1.0, 1.5):
        weights = {
            name: np.asarray(value) * np.float32(factor if name.endswith("qkv.weight") else 1)
            for name, value in flat.items()
        }
        folder = tmp_path / f"latents-{factor}"
        write_latents(folder, {"student": weights}, config.quant, config.policy)
        out = tmp_path / f"run-{factor}"
        task = Task(teacher=str(teacher), prompts=prompts, start=folder)
        some = dataclasses.replace(config, held_out=2, sample_every=0, checkpoint_every=9)
        distill(task, out, some, mesh=one_device(), progress=False)
        found.append(losses(out))
    assert found[0] == losses(whole[0])
    assert found[1][0] != found[0][0]


def test_a_gradient_that_is_not_finite_is_not_saved(
    teacher, prompts, settings, tmp_path, monkeypatch
):
    """Its step's loss is finite, but the parameters after it are not."""
    real = StepFunction.__call__

    def step(self, state, *inputs):
        after, metrics = real(self, state, *inputs)
        norm = jnp.where(after.step == 3, jnp.nan, metrics.grad_norm)
        return after, metrics._replace(grad_norm=norm)

    monkeypatch.setattr(StepFunction, "__call__", step)
    config = read_run_config(settings, ["checkpoint_every=1", "held_out=0"])
    task = Task(teacher=str(teacher), prompts=prompts)
    message = "grad_norm of step 3 is not finite; the last good checkpoint is step 2"
    with pytest.raises(UserError, match=message):
        distill(task, tmp_path / "run", config, mesh=one_device(), progress=False)
    assert not (tmp_path / "run" / "checkpoints" / "3").exists()


def test_a_folder_has_one_run_at_a_time(whole, teacher, prompts, settings):
    out, _ = whole
    task = Task(teacher=str(teacher), prompts=prompts)
    with claimed(out), pytest.raises(UserError, match="another run is at work here"):
        distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)


def test_tables_that_cannot_be_written_are_one_line(teacher, prompts, settings, tmp_path):
    out = tmp_path / "run"
    task, config = Task(teacher=str(teacher), prompts=prompts), read_run_config(settings)
    open_folder(out, task, config, split_prompts(task, config), 0)
    (out / "metrics.csv").mkdir()
    with pytest.raises(UserError, match="run: cannot be written: Is a directory; the run goes on"):
        distill(task, out, config, mesh=one_device(), progress=False)


@pytest.mark.long
def test_a_mesh_gives_the_same_losses(teacher, prompts, settings, whole, tmp_path):
    task = Task(teacher=str(teacher), prompts=prompts)
    config = read_run_config(settings, ["distill.steps=9"])
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    distill(task, tmp_path / "run", config, mesh=mesh, progress=False)
    expected = np.array(losses(whole[0]), float)
    np.testing.assert_allclose(np.array(losses(tmp_path / "run"), float), expected, rtol=1e-4)


def test_prompts_are_encoded_once(whole, teacher, prompts, settings, monkeypatch):
    """A second process of the same run finds the embeddings on disk, by whichever path it goes."""
    out, _ = whole

    def refuse(*args, **kwargs):
        raise AssertionError("the text encoders were loaded")

    monkeypatch.setattr(TextEncoders, "from_pretrained", refuse)
    task = Task(teacher=f"{teacher.parent}/./{teacher.name}/", prompts=prompts)
    before = losses(out)
    again = distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)
    assert losses(out) == before
    # A run that is done ends as it ended.
    assert again.loss == whole[1].loss
    assert again.median_psnr == whole[1].median_psnr


def test_another_teacher_in_the_same_place_is_refused(whole, teacher, prompts, settings, tmp_path):
    out, place = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(whole[0], out)
    shutil.copytree(teacher, place)
    task = Task(teacher=str(place), prompts=prompts)
    again = distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)
    assert again.loss == whole[1].loss
    assert len(list(out.glob("embeddings-*"))) == 1
    (file,) = (place / "transformer").glob("*.safetensors")
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
    with pytest.raises(UserError, match=r"holds a run with other settings \(teacher_crc32: "):
        distill(task, out, read_run_config(settings), mesh=one_device(), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.step=3", "unknown setting 'distill.step'; there are: accumulate"),
        ("batch_size=0", "batch_size must be a whole number of at least 1, got 0"),
        ("distill.learning_rate=fast", "'distill.learning_rate' must be like 0.0005, got 'fast'"),
        ("distill", "a setting is changed by KEY=VALUE"),
        ("distill.optimizer=sgd", "optimizer must be one of"),
        ("policy.include=[nothing.*]", "include pattern 'nothing.*' matches none"),
        ("seed=2024-99-99", "'seed=2024-99-99': a value cannot be read: month must be in 1..12"),
        ("seed=" + "1" * 5000, "a value cannot be read: Exceeds the limit"),
        ("seed=0x" + "f" * 5000, "a value cannot be read: int too large"),
        ("distill.learning_rate=1" + "0" * 400, "a value cannot be read: int too large"),
        ("distill={steps: 3, steps: 4}", "the mapping in line 1 has the key 'steps' twice"),
        ("batch_size=[", "it is not YAML"),
        ("policy.include=&a [*a]", "a value of the settings is a part of itself"),
        ("distill.steps=2.5", "'distill.steps' must be like 10000, got 2.5"),
    ],
)
def test_settings_are_refused(teacher, prompts, tmp_path, change, message):
    result = refused(teacher, prompts, tmp_path / "run", "--set", change)
    assert message in result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ndistill:\n  steps: 3\n  steps: 4\n", "line 3 has the key 'steps' twice"),
        ("seed: 1\nseed: 2\n", "line 1 has the key 'seed' twice"),
        ("seed: 2024-99-99\n", "a value cannot be read: month must be in 1..12"),
    ],
)
def test_a_file_of_settings_is_refused(teacher, prompts, tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    result = refused(teacher, prompts, tmp_path / "run", "--config", path)
    assert f"cannot read the settings {path}: " in result
    assert message in result


def refused(teacher, prompts, out, *more):
    arguments = ("distill", "--teacher", teacher, "--prompts", prompts, "--out", out, *more)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_paths_may_be_text(teacher, prompts, settings, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    task = Task(teacher=teacher, prompts=str(prompts), held_out=prompts.with_name("other.txt"))
    prompts.with_name("other.txt").write_text("a green star")
    assert split_prompts(task, RunConfig()).held_out == ["a green star"]
    with pytest.raises(UserError, match="is not empty and holds no run"):
        distill(task, str(tmp_path), read_run_config(settings), mesh=one_device())
    start = dataclasses.replace(task, start=str(tmp_path))
    with pytest.raises(UserError, match=r"has no latents\.json"):
        distill(start, str(tmp_path), read_run_config(settings), mesh=one_device())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_inputs_are_refused(whole, teacher, prompts, settings, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is empty" in refused(teacher, empty, tmp_path / "a")
    assert "is not UTF-8 text" in refused(teacher, binary, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert "no such file" in refused(tmp_path / "none", prompts, tmp_path / "b")
    assert "is ternary already" in refused("tiny-ternary", prompts, tmp_path / "b")
    policy = ("--set", "policy.include=[nothing.*]")
    assert "'nothing.*' matches none" in refused(teacher, prompts, tmp_path / "b", *policy)
    assert "height must be" in refused(teacher, prompts, tmp_path / "b", "--set", "height=33")
    # The corrected command finds no run that stands in its way.
    assert not (tmp_path / "b").exists()
    settings_changed = ("--config", settings, "--set", "seed=5")
    assert "holds a run with other settings (seed: 0 -> 5)" in refused(
        teacher, prompts, whole[0], *settings_changed
    )
    assert "holds no run" in refused(teacher, prompts, tmp_path)
    assert "cannot read the settings" in refused(
        teacher, prompts, tmp_path / "c", "--config", tmp_path / "none.yaml"
    )
    start = ("--start", tmp_path)
    assert "has no latents.json" in refused(teacher, prompts, tmp_path / "e", *start)
    assert not (tmp_path / "e").exists()
    assert "must be a multiple of the 8 devices of data and fsdp, got 3" in refused(
        teacher, prompts, tmp_path / "d", "--set", "batch_size=3"
    )


def test_show_config_prints_every_setting(tmp_path):
    shown = CliRunner().invoke(app, ["distill", "--show-config", "--set", "seed=7"])
    path = tmp_path / "shown.yaml"
    path.write_text(shown.stdout)
    assert read_run_config(path) == read_run_config(None, ["seed=7"])


def test_what_a_run_needs_is_named():
    done = CliRunner().invoke(app, ["distill", "--teacher", "tiny"])
    assert done.exit_code == 2
    assert done.stderr == "error: missing: --prompts, --out\n"
