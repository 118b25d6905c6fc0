"""Adapting a LoRA to a student: it draws nearer to the teacher's, resumes, and refuses clearly."""

from __future__ import annotations

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from flux_jax.checkpoint import load_lora
from flux_jax.errors import UserError
from flux_jax.linears import linears
from flux_jax.lora import LoRALinear, attach
from flux_jax.pipeline import FluxPipeline
from flux_jax.tree import split_flat, to_flat
from ternary.cli import app
from ternary.config import AdaptConfig, DistillConfig, QuantConfig, TrajectoryConfig
from ternary.distillation import adapt
from ternary.distillation.adapt import AdaptTask, adapt_lora
from ternary.distillation.lora_step import LoRAStep, Models, split_factors
from ternary.distillation.step import PromptRows
from ternary.distillation.trajectory import Trajectories
from ternary.layers import TernaryLinear
from ternary.policy import Policy
from ternary.storage.rounding import quantize_checkpoint
from ternary.student import freeze_student, make_student
from tests.lora_files import small_lora
from tests.small_pipeline import TRANSFORMER, WORDS, small_folder, small_pipeline

PROMPTS = [f"a {color} {shape}" for color in ("red", "blue") for shape in WORDS[6:10]]
CONFIG = AdaptConfig(steps=6, batch_size=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Teacher, its rounded student, a LoRA and prompts."""
    root = tmp_path_factory.mktemp("adapt")
    teacher = small_folder(root / "teacher")
    quantize_checkpoint(str(teacher), root / "student", QuantConfig(activation_bits=8), Policy())
    small_lora(root / "lora.safetensors", TRANSFORMER)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def task(folders, **changes):
    return AdaptTask(
        **{
            "teacher": folders / "teacher",
            "student": folders / "student",
            "lora": str(folders / "lora.safetensors"),
            "prompts": folders / "prompts.txt",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A run that nothing disturbed, and how it ended."""
    out = tmp_path_factory.mktemp("run") / "run"
    return out, adapt_lora(task(folders), out, CONFIG, progress=False)


def rows_of(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def step():
    """A step in float32 on a small teacher and its packed student, each with the same LoRA."""
    pipe = small_pipeline()
    teacher = pipe.transformer
    student = freeze_student(make_student(teacher, QuantConfig(refit_steps=3), Policy()))
    plan = pipe.plan(num_inference_steps=4)
    trajectories = Trajectories(
        TrajectoryConfig(sampling_steps=(4,), groups=2),
        pipe.scheduler,
        tokens=plan.token_shape,
        batch_size=4,
        prompts=len(PROMPTS),
    )
    texts = pipe.encode_prompt(PROMPTS)

    def make(path, config):
        for model in (teacher, student):
            attach(model, load_lora(path, TRANSFORMER))
        made = LoRAStep(teacher, student, config, trajectories, grid=plan.grid)
        fixed, factors = split_factors(student)
        rows = (np.asarray(texts.prompt_embeds), np.asarray(texts.pooled_prompt_embeds))
        return made, Models(split_flat(teacher)[1], fixed), factors, rows

    return make, student


def test_training_brings_the_student_to_the_teacher(step, folders):
    make, student = step
    config = DistillConfig(steps=80, learning_rate=5e-3, warmup=5)
    made, models, factors, texts = make(folders / "lora.safetensors", config)
    assert {type(x.base) for x in linears(student, LoRALinear).values()} >= {TernaryLinear}
    assert {n.rpartition(".")[2] for n in factors} == {"lora_a", "lora_b"}
    assert not set(factors) & set(models.student)
    state = made.start(factors)
    program = jax.jit(made)
    errors = []
    for number in range(config.steps):
        prompt = np.asarray(state.pool.prompt[number % 2])
        state, metrics = program(state, models, PromptRows(*(t[prompt] for t in texts)))
        errors.append(float(metrics.relative))
    assert np.mean(errors[-10:]) < 0.5 * np.mean(errors[:4])
    # Nothing else has changed, and the trajectories have moved.
    assert set(state.params) == set(factors)
    assert int(state.step) == config.steps
    assert np.asarray(state.pool.started).sum() > 0


def test_gradients_go_through_packed_weights(step, folders):
    """By differences of the loss along them, in float32."""
    make, _ = step
    made, models, factors, texts = make(folders / "lora.safetensors", DistillConfig(steps=10))
    state = made.start(factors)
    prompt = np.asarray(state.pool.prompt[0])
    rows = PromptRows(*(jnp.asarray(t[prompt]) for t in texts))

    @jax.jit
    def metrics(params):
        return made(state._replace(params=params), models, rows)[1]

    gradient = jax.grad(lambda params: metrics(params).loss)(state.params)
    norm = float(metrics(state.params).grad_norm)
    ahead, behind = (
        float(metrics({n: v + size * gradient[n] / norm for n, v in state.params.items()}).loss)
        for size in (0.02, -0.02)
    )
    assert (ahead - behind) / 0.04 == pytest.approx(norm, rel=0.05)


def test_a_run_leaves_the_students_lora(whole, folders):
    out, outcome = whole
    assert outcome.lora == out / "lora.safetensors"
    assert outcome.steps == CONFIG.steps
    assert [int(row["step"]) for row in rows_of(out)] == list(range(1, 7))
    errors = [float(row["relative"]) for row in rows_of(out)]
    assert outcome.first == pytest.approx(np.mean(errors[:4]))
    assert outcome.last == pytest.approx(np.mean(errors))
    before, after = (
        load_lora(folders / "lora.safetensors", TRANSFORMER),
        load_lora(outcome.lora, TRANSFORMER),
    )
    assert set(after.layers) == set(before.layers)
    assert all(
        not np.allclose(
            after.layers[n].b @ after.layers[n].a, before.layers[n].b @ before.layers[n].a
        )
        for n in before.layers
    )
    pipe = FluxPipeline.from_pretrained(folders / "student")
    pipe.load_lora(outcome.lora)
    assert pipe("a red circle", num_inference_steps=2, progress=False).images


def test_a_stopped_run_goes_on_bit_for_bit(whole, folders, tmp_path, monkeypatch, caplog):
    look = adapt._Run._look

    def interrupted(self, step, *rest):
        look(self, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt._Run, "_look", interrupted)
    caplog.set_level("INFO", "ternary")
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        adapt_lora(task(folders), out, CONFIG, progress=False)
    assert not (out / "lora.safetensors").exists()
    assert any("the last good checkpoint is step 4" in message for message in caplog.messages)
    monkeypatch.setattr(adapt._Run, "_look", look)
    adapt_lora(task(folders), out, CONFIG, progress=False)
    assert "going on from step 4 of 6" in caplog.messages
    assert rows_of(out) == rows_of(whole[0])
    found, expected = (load_file(run / "lora.safetensors") for run in (out, whole[0]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_the_scale_is_in_the_result(folders, tmp_path):
    """At a rate of almost nothing the result is the LoRA, times its scale, in bfloat16."""
    config = dataclasses.replace(CONFIG, steps=1, learning_rate=1e-12)
    name = f"{folders / 'lora.safetensors'}:0.5"
    found = adapt_lora(task(folders, lora=name), tmp_path / "run", config, progress=False)
    before, after = (load_lora(p, TRANSFORMER) for p in (folders / "lora.safetensors", found.lora))
    for layer, change in before.layers.items():
        got = after.layers[layer]
        expected = 0.5 * change.b @ change.a
        assert np.linalg.norm(got.b @ got.a - expected) < 0.01 * np.linalg.norm(expected)


def test_only_as_many_prompts_as_are_drawn_are_encoded():
    prompts = [str(number) for number in range(1000)]
    some = adapt._some(prompts, AdaptConfig(steps=10, batch_size=4))
    # Four groups of four, and those that begin anew.
    assert len(some) == 4 * 4 + 10 * 4 // 20
    assert set(some) < set(prompts)
    assert some == adapt._some(prompts, AdaptConfig(steps=10, batch_size=4))
    assert adapt._some(prompts[:5], CONFIG) == prompts[:5]


def test_inputs_are_refused(whole, folders, tmp_path):
    out, _ = whole
    other = small_lora(tmp_path / "other.safetensors", TRANSFORMER, seed=1)
    for changes, config, message in (
        ({}, dataclasses.replace(CONFIG, steps=7), "steps: 6 -> 7"),
        ({"lora": str(other)}, CONFIG, "lora_crc32"),
        ({"student": folders / "teacher"}, CONFIG, "student_crc32"),
    ):
        with pytest.raises(UserError, match=message):
            adapt_lora(task(folders, **changes), out, config, progress=False)
    with pytest.raises(UserError, match="is no student of .*axes_dim"):
        adapt_lora(task(folders, student="tiny-ternary", lora=str(other)), tmp_path / "n", CONFIG)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        adapt_lora(task(folders), tmp_path / "full", CONFIG)
    assert not (tmp_path / "n").exists()
    with pytest.raises(UserError, match="steps must be"):
        AdaptConfig(steps=0)


def test_a_loss_that_is_not_finite_stops_the_run(folders, tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    with pytest.raises(UserError, match="is not finite; .*lower learning rate"):
        adapt_lora(task(folders), tmp_path / "run", config, progress=False)
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def test_the_command(whole, folders):
    """Given again to a run that has ended, it tells what it told."""
    out, outcome = whole
    options = {
        "--teacher": folders / "teacher",
        "--student": folders / "student",
        "--lora": folders / "lora.safetensors",
        "--prompts": folders / "prompts.txt",
        "--steps": CONFIG.steps,
        "--batch-size": CONFIG.batch_size,
        "--out": out,
    }
    words = [str(word) for pair in options.items() for word in pair]
    told = CliRunner().invoke(app, ["adapt", *words, "--json", "--quiet"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {**dataclasses.asdict(outcome), "lora": str(outcome.lora)}
    told = CliRunner().invoke(app, ["adapt", *words, "--quiet", "--seed", "3"])
    assert told.exit_code == 2
    assert "seed: 0 -> 3" in told.stderr


def test_no_weight_is_changed(whole, folders):
    """The student's files are those that were there."""
    pipe = FluxPipeline.from_pretrained(folders / "student")
    before = to_flat(pipe.transformer)
    pipe.load_lora(whole[1].lora)
    pipe.unload_loras()
    for name, value in to_flat(pipe.transformer).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(before[name]))
