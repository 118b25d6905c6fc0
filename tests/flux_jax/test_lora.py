"""LoRAs beside linears of every kind: alone, in a pipeline, on a mesh, on the command line."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from typer.testing import CliRunner

import ternary
from flux_jax.checkpoint import load_lora, save_checkpoint
from flux_jax.cli import app
from flux_jax.components import abstract_module
from flux_jax.errors import UserError
from flux_jax.functional import SplitModule
from flux_jax.images import psnr
from flux_jax.inputs import Hidden, Joined, Modulated, dense
from flux_jax.layers import Linear
from flux_jax.linears import linears
from flux_jax.lora import (
    LoRA,
    LoRALinear,
    LowRank,
    attach,
    detach,
    linear_shapes,
    read_name,
)
from flux_jax.metadata import read_png
from flux_jax.pipeline import FluxPipeline
from flux_jax.sharding import make_mesh, spread
from ternary.config import QuantConfig
from ternary.layers import TernaryLinear
from ternary.policy import Policy
from ternary.student import freeze_student, make_student
from tests.lora_files import random_factors, small_lora, write_lora
from tests.random_module import random_module
from tests.small_pipeline import TRANSFORMER, small_folder, small_pipeline

STEPS = {"num_inference_steps": 2, "progress": False, "output_type": "np"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", TRANSFORMER)


def drawn(pipe, prompt="a red circle"):
    return pipe(prompt, seed=0, **STEPS)


# -- one layer -------------------------------------------------------------------------------------


def layer(kind, width, rows=24):
    linear = Linear(width, rows, dtype=jnp.float32, rngs=nnx.Rngs(0))
    linear.bias.set_value(jax.random.normal(jax.random.key(1), (rows,)))
    if kind == "dense":
        return linear
    return TernaryLinear.from_linear(linear, QuantConfig(activation_bits=int(kind)))


def statements(width):
    """Inputs as blocks state them; one vector for each of two images."""
    rng = np.random.default_rng(3)
    x, hidden = (jnp.asarray(rng.standard_normal((2, 5, n)), jnp.float32) for n in (width, 40))
    shift, scale = jnp.asarray(rng.standard_normal((2, 2, width)), jnp.float32)
    return {
        "array": x,
        "modulated": Modulated(x, shift, scale),
        "hidden": Hidden(hidden, start=40 - width),
        "joined": Joined(x[..., :4], Hidden(hidden, start=40 - width + 4)),
    }


@pytest.mark.parametrize("kind", ["dense", "16", "8"])
@pytest.mark.parametrize("stated", ["array", "modulated", "hidden", "joined"])
def test_a_layer_is_its_base_and_the_change(kind, stated):
    base, x = layer(kind, 16), statements(16)[stated]
    a, b = random_factors({"": (24, 16)}, strength=0.5)[""]
    changed = LoRALinear(base, jnp.asarray(a), jnp.asarray(b))
    change = np.asarray(dense(x), np.float64) @ (b @ a).T
    np.testing.assert_allclose(changed(x), base(x) + change, rtol=1e-4, atol=1e-4)
    gate = jax.random.normal(jax.random.key(5), (2, 24))
    residual = jax.random.normal(jax.random.key(6), (2, 5, 24))
    expected = base(x, gate=gate, residual=residual) + np.asarray(gate)[:, None] * change
    np.testing.assert_allclose(
        changed(x, gate=gate, residual=residual), expected, rtol=1e-4, atol=1e-4
    )
    # A base with 16-bit activations would have done the GELU before the change.
    gelu = dense(Hidden(jnp.asarray(base(x) + change)))
    np.testing.assert_allclose(dense(changed.hidden(x)), gelu, rtol=1e-4, atol=1e-4)
    first, rest = changed.apart(x, 8)
    np.testing.assert_allclose(first[..., :8], (base(x) + change)[..., :8], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dense(rest), gelu[..., 8:], rtol=1e-4, atol=1e-4)


# -- a transformer ---------------------------------------------------------------------------------


def flat_paths(module):
    return {path: type(child) for path, child in linears(module, (Linear, LoRALinear)).items()}


def test_attached_and_detached(file):
    transformer = random_module("transformer", TRANSFORMER, jnp.float32)
    before, apart = flat_paths(transformer), SplitModule.of(transformer)
    lora = load_lora(file, TRANSFORMER, scale=0.5)
    attach(transformer, lora)
    changed = linears(transformer, LoRALinear)
    assert changed.keys() == lora.layers.keys() == linear_shapes(TRANSFORMER).keys()
    assert (transformer.dtype, transformer.mesh) == (jnp.float32, None)
    one = changed["img_in"]
    np.testing.assert_allclose(
        one.lora_b[...] @ one.lora_a[...],
        0.5 * lora.layers["img_in"].b @ lora.layers["img_in"].a,
        rtol=1e-6,
        atol=1e-7,
    )
    detach(transformer)
    assert flat_paths(transformer) == before
    after = SplitModule.of(transformer)
    # The very arrays, and the program that was compiled for them.
    assert after.treedef == apart.treedef
    assert all(new is old for new, old in zip(after.leaves, apart.leaves, strict=True))


def test_what_does_not_fit_changes_nothing():
    transformer = random_module("transformer", TRANSFORMER, jnp.float32)
    before = SplitModule.of(transformer)
    right = LowRank(np.ones((2, 32), np.float32), np.ones((32, 2), np.float32))
    name = "double_blocks.0.img_attn.proj"
    for path, change, message in (
        ("double_blocks.7.img_attn.proj", right, "here it is no linear"),
        (name, LowRank(right.a[:, :7], right.b), r"here it is of shape \(32, 32\)"),
        (name, LowRank(right.a, right.b[:9]), r"here it is of shape \(32, 32\)"),
        (name, LowRank(right.a[:0], right.b[:, :0]), "rank 0, which is no change"),
    ):
        lora = LoRA(path="other", layers={name: right} | {path: change})
        with pytest.raises(UserError, match=f"other: changes {path} by .*{message}"):
            attach(transformer, lora)
        assert SplitModule.of(transformer).treedef == before.treedef
    with pytest.raises(UserError, match="scale of a LoRA must be a finite number, got nan"):
        attach(transformer, LoRA(path="other", layers={name: right}, scale=float("nan")))
    assert SplitModule.of(transformer).treedef == before.treedef


def test_the_base_stays_where_it_was_put(file):
    """Loaded with rules of one's own."""
    transformer = random_module("transformer", TRANSFORMER, jnp.float32)
    mesh = make_mesh(data=2, tensor=2)
    spread(transformer, mesh)
    linear = transformer.double_blocks[0].img_attn.qkv
    own = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    linear.weight.set_value(jax.device_put(linear.weight[...], own))
    weight = linear.weight.get_value()
    attach(transformer, load_lora(file, TRANSFORMER))
    changed = transformer.double_blocks[0].img_attn.qkv
    assert changed.base.weight.get_value() is weight
    assert changed.lora_a.get_value().sharding == NamedSharding(mesh, PartitionSpec())
    detach(transformer)
    assert transformer.double_blocks[0].img_attn.qkv.weight.get_value() is weight


def test_no_part_of_a_checkpoint(file, tmp_path):
    transformer = random_module("transformer", TRANSFORMER, jnp.float32)
    attach(transformer, load_lora(file, TRANSFORMER))
    with pytest.raises(UserError, match="has LoRAs beside its weights: unload them first"):
        save_checkpoint(tmp_path / "dense", {"transformer": transformer})
    with pytest.raises(UserError, match="has LoRAs beside its weights: unload them first"):
        ternary.save_checkpoint(tmp_path / "ternary", transformer, rest="tiny")
    assert not list(tmp_path.iterdir())


def test_several_add_up(tmp_path):
    """Also where they change different layers."""
    factors = random_factors(linear_shapes(TRANSFORMER))
    some = {name: factors[name] for name in ("img_in", "single_blocks.0.linear1")}
    other = {name: factors[name] for name in ("img_in", "double_blocks.0.txt_mlp.out_layer")}
    transformer = random_module("transformer", TRANSFORMER, jnp.float32)
    for number, (part, scale) in enumerate(((some, 1.0), (other, -2.0))):
        path = write_lora(tmp_path / f"{number}.safetensors", part)
        attach(transformer, load_lora(path, TRANSFORMER, scale=scale))
    changed = linears(transformer, LoRALinear)
    assert changed.keys() == some.keys() | other.keys()
    assert not isinstance(changed["img_in"].base, LoRALinear)
    a, b = factors["img_in"]
    both = changed["img_in"].lora_b[...] @ changed["img_in"].lora_a[...]
    np.testing.assert_allclose(both, -b @ a, rtol=1e-5, atol=1e-6)


def test_shapes_alone_have_the_structure_that_arrays_have(file):
    """`generate` traces its programs before the weights are there."""
    lora = load_lora(file, TRANSFORMER)
    abstract = abstract_module("transformer", TRANSFORMER, jnp.bfloat16)
    real = random_module("transformer", TRANSFORMER, jnp.bfloat16)
    for number in range(2):
        for module in (abstract, real):
            attach(module, lora)
        shapes, arrays = SplitModule.of(abstract), SplitModule.of(real)
        assert shapes.treedef == arrays.treedef, number
        assert [s.shape for s in shapes.leaves] == [a.shape for a in arrays.leaves]
        assert [s.dtype for s in shapes.leaves] == [a.dtype for a in arrays.leaves]


# -- a pipeline ------------------------------------------------------------------------------------


def merged(file, scale):
    """A pipeline whose weights have the change in them."""
    pipe = small_pipeline()
    for path, change in load_lora(file, TRANSFORMER).layers.items():
        linear = linears(pipe.transformer)[path]
        linear.weight.set_value(linear.weight[...] + scale * change.b @ change.a)
    return pipe


def test_images_are_those_of_merged_weights(file):
    pipe = small_pipeline()
    plain, fingerprint = drawn(pipe), pipe.fingerprint()
    pipe.load_lora(file, scale=0.8)
    found, expected = drawn(pipe), drawn(merged(file, 0.8))
    np.testing.assert_allclose(found.images, expected.images, atol=2e-5)
    assert np.abs(found.images - plain.images).max() > 0.02
    assert pipe.loras == found.records[0].loras == (f"{file}:0.8",)
    assert plain.records[0].loras == ()
    assert pipe.fingerprint() != fingerprint
    pipe.unload_loras()
    assert pipe.loras == ()
    np.testing.assert_array_equal(drawn(pipe).images, plain.images)


def test_with_modulation_weights_on_the_host(file):
    pipe, offloaded = small_pipeline(), small_pipeline(offload_modulation=True)
    for one in (pipe, offloaded):
        one.load_lora(file)
    np.testing.assert_array_equal(drawn(offloaded).images, drawn(pipe).images)
    waiting = offloaded.transformer.double_blocks[0].img_mod.lin
    assert isinstance(waiting.base.weight.get_value(), np.ndarray)
    assert isinstance(waiting.lora_a.get_value(), np.ndarray)
    for one in (pipe, offloaded):
        one.unload_loras()
    np.testing.assert_array_equal(drawn(offloaded).images, drawn(pipe).images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"data": 2}, {"sequence": 2}, {"tensor": 2}, {"sequence": 2, "tensor": 2}], ids=str
)
def test_on_a_mesh(file, axes):
    pipe, split = small_pipeline(), small_pipeline(mesh=make_mesh(**axes))
    for one in (pipe, split):
        one.load_lora(file)
    prompts = ["a red circle", "the blue cube"]
    np.testing.assert_allclose(drawn(split, prompts).images, drawn(pipe, prompts).images, atol=2e-5)


def test_a_lora_of_the_teacher_acts_on_its_packed_student(tmp_path):
    """It brings this picture of the student, packed at two bits, nearer to the teacher's with it.

    How much, and when it does not: "The teacher's LoRAs" in docs/distillation.md.
    """
    teacher = FluxPipeline.from_pretrained("tiny")
    student = FluxPipeline.from_pretrained("tiny-ternary", text_encoders=teacher.text_encoders)
    shapes = linear_shapes(teacher.transformer.config)
    changed = {name: shape for name, shape in shapes.items() if name.startswith("double_blocks")}
    factors = random_factors(changed, rank=8, strength=0.15)
    path = write_lora(tmp_path / "lora.safetensors", factors)

    def picture(pipe):
        prompt = "a red circle above a blue square"
        return pipe(prompt, seed=1, **{**STEPS, "num_inference_steps": 8}).images

    before, without = picture(teacher), picture(student)
    for pipe in (teacher, student):
        pipe.load_lora(path)
    found = linears(student.transformer, LoRALinear).values()
    assert {type(linear.base) for linear in found} == {TernaryLinear}
    after, within = picture(teacher), picture(student)
    assert psnr(without, before)[0] > 35
    assert psnr(after, before)[0] < 30
    assert psnr(within, after)[0] > psnr(without, after)[0] + 2


def test_a_pipeline_writes_what_it_has(file, tmp_path):
    """Two LoRAs as one, their scales multiplied in; none is refused."""
    pipe = small_pipeline()
    with pytest.raises(UserError, match="has no LoRA"):
        pipe.save_lora(tmp_path / "both.safetensors")
    pipe.load_lora(file, scale=0.5)
    pipe.load_lora(small_lora(tmp_path / "other.safetensors", TRANSFORMER, seed=2))
    expected = drawn(pipe).images
    pipe.save_lora(tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="exists"):
        pipe.save_lora(tmp_path / "both.safetensors")
    pipe.unload_loras()
    pipe.load_lora(tmp_path / "both.safetensors")
    np.testing.assert_array_equal(drawn(pipe).images, expected)
    pipe.unload_loras()
    assert psnr(drawn(pipe).images, expected)[0] < 60


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_on_a_small_student(file, activation_bits):
    """Every linear of the blocks is packed; a scale of nothing changes nothing."""
    pipe = small_pipeline(dtype=jnp.bfloat16)
    quant = QuantConfig(activation_bits=activation_bits)
    pipe.transformer = freeze_student(make_student(pipe.transformer, quant, Policy()))
    plain = drawn(pipe).images
    pipe.load_lora(file, scale=0.0)
    # What is added is 0, but a program with it may sum in another order.
    nothing = np.abs(drawn(pipe).images - plain)
    pipe.load_lora(file, scale=1.0)
    assert len(pipe.loras) == 2
    something = np.abs(drawn(pipe).images - plain)
    assert nothing.mean() < 0.002
    assert something.mean() > 0.01


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b.safetensors", ("a/b.safetensors", 1.0)),
        ("a/b.safetensors:0.8", ("a/b.safetensors", 0.8)),
        ("b.safetensors:-1", ("b.safetensors", -1.0)),
        (r"C:\b.safetensors", (r"C:\b.safetensors", 1.0)),
        (r"C:\b.safetensors:2", (r"C:\b.safetensors", 2.0)),
    ],
)
def test_names(text, expected):
    assert read_name(text) == expected


@pytest.mark.parametrize("scale", [0.8, -1.0, 0.123456789, 1e-9, 3.0])
def test_a_name_says_the_scale_exactly(scale):
    assert read_name(str(LoRA(path="a:b.safetensors", layers={}, scale=scale))) == (
        "a:b.safetensors",
        scale,
    )


def test_a_scale_must_be_finite(file):
    with pytest.raises(UserError, match="the scale of a LoRA must be a finite number, got nan"):
        read_name("b.safetensors:nan")
    with pytest.raises(UserError, match="the scale of a LoRA must be a finite number, got inf"):
        small_pipeline().load_lora(file, scale=float("inf"))


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("model") / "model")


def test_generate_and_replay(model, file, tmp_path):
    plain, first, again, other = (tmp_path / f"{n}.png" for n in ("plain", "first", "again", "x"))
    settings = ("--model", model, "--steps", 2, "--dtype", "fp32", "--seed", 3)
    run("generate", "a red circle", *settings, "--out", plain)
    run("generate", "a red circle", *settings, "--lora", f"{file}:0.5", "--out", first)
    record = read_png(first)
    assert record.loras == (f"{file}:0.5",)
    assert record.fingerprint != read_png(plain).fingerprint
    result = run("generate", "--replay", first, "--out", again)
    assert "will differ" not in result.stderr
    assert again.read_bytes() == first.read_bytes()
    run("generate", "--replay", first, "--lora", file, "--lora", f"{file}:-0.5", "--out", other)
    assert read_png(other).loras == (f"{file}:1", f"{file}:-0.5")
    assert plain.read_bytes() != first.read_bytes() != other.read_bytes()


def test_a_path_that_is_no_text(model, file, tmp_path):
    """As Python reads a file's name that is no UTF-8: the picture is kept."""
    odd, out = tmp_path / "st\udcffyle.safetensors", tmp_path / "image.png"
    odd.write_bytes(file.read_bytes())
    run("generate", "a cube", "--model", model, "--steps", 1, "--lora", odd, "--out", out)
    assert read_png(out).loras == (f"{odd}:1",)


def test_many_images_with_a_lora_are_not_mixed_with_those_without(model, file, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\nthe star")
    settings = ("--prompts", tmp_path / "prompts.txt", "--model", model, "--steps", 1, "--json")
    command = ("generate", *settings, "--out", tmp_path / "out")
    assert json.loads(run(*command, "--lora", file).stdout)["drawn"] == 2
    assert json.loads(run(*command, "--lora", file).stdout)["drawn"] == 0
    # The same, whatever it is called.
    again = tmp_path / "again.safetensors"
    again.symlink_to(file)
    assert json.loads(run(*command, "--lora", f"{again}:1.0").stdout)["drawn"] == 0
    for other in ((), ("--lora", f"{file}:0.5")):
        assert "is there with fingerprint" in run(*command, *other, code=2).stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.safetensors", "absent.safetensors: no such file or folder"),
        ("lora.pt", "lora.pt: refused: a pickle"),
        ("cut.safetensors", "cut.safetensors: 3 bytes are too few for a safetensors file"),
        ("empty", "empty: expected one .safetensors file, found 0"),
    ],
)
def test_what_cannot_be_read_is_one_line(model, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.pt").write_bytes(b"abc")
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    (tmp_path / "empty").mkdir()
    result = run("generate", "a cube", "--model", model, "--lora", name, code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "image.png").exists()
