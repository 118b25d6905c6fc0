"""Ternary checkpoints: round trips, what loading holds in memory, and damage."""

import errno
import inspect
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import engine
from convert.tables import TERNARY_FILE as FILE
from convert.tensors import Spec
from flux_jax.checkpoint import inspect_checkpoint, load_checkpoint
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.linears import linears, replace_linears
from flux_jax.lora import LoRALinear
from flux_jax.pipeline import FluxPipeline
from flux_jax.sharding import make_mesh
from flux_jax.tree import to_flat
from ternary.config import GRANULARITIES, QuantConfig
from ternary.layers import FakeTernaryLinear, TernaryLinear
from ternary.policy import Policy, select
from ternary.storage import base3, checkpoint, inspection
from ternary.storage.checkpoint import abstract_ternary, dense_shapes, open_checkpoint
from ternary.storage.format import expected_tensors
from ternary.storage.rounding import quantize_checkpoint
from ternary.storage.saving import save_checkpoint
from ternary.storage.tensor_file import TensorFile
from tests.small_pipeline import small_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("teacher") / "m")


@pytest.fixture(scope="module")
def rounded(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("rounded") / "m"
    quantize_checkpoint(teacher, path, QuantConfig(), Policy())
    return path


@pytest.fixture
def copy(rounded, tmp_path):
    """A copy, to be broken; the transformer's folder."""
    shutil.copytree(rounded, tmp_path / "m")
    return tmp_path / "m" / "transformer"


def transformer(path, **options):
    return load_checkpoint(path, components=["transformer"], **options).modules["transformer"]


def student(teacher, quant, kind=FakeTernaryLinear):
    model = transformer(teacher)
    names = select(list(linears(model)), Policy())
    replace_linears(model, names, lambda name, dense: kind.from_linear(dense, quant))
    return model


def assert_same_arrays(one, other):
    one, other = to_flat(one), to_flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other[name]), err_msg=name)


@pytest.mark.parametrize(
    ("granularity", "rank"), [*((granularity, 0) for granularity in GRANULARITIES), ("channel", 2)]
)
def test_save_and_load(teacher, tmp_path, granularity, rank):
    quant = QuantConfig(granularity=granularity, rank=rank, activation_bits=8, refit_steps=1)
    model = student(teacher, quant)
    save_checkpoint(tmp_path / "m", model, rest=teacher)
    loaded = transformer(tmp_path / "m")
    names = list(linears(model, FakeTernaryLinear))
    replace_linears(model, names, lambda name, fake: fake.freeze())
    assert_same_arrays(loaded, model)
    layer = loaded.single_blocks[0].linear1
    assert (layer.activation_bits, layer.dtype) == (8, jnp.bfloat16)
    # Saving what was loaded writes the same file.
    save_checkpoint(tmp_path / "again", loaded, rest=tmp_path / "m")
    files = [tmp_path / name / "transformer" / FILE for name in ("m", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_quantize_equals_rounding_in_memory(teacher, rounded):
    """The streaming packer and the JAX quantiser write the same checkpoint."""
    model = student(teacher, QuantConfig(), TernaryLinear)
    loaded = transformer(rounded)
    for name, value in to_flat(model).items():
        other = np.asarray(to_flat(loaded)[name])
        if name.endswith(".scale") and value.dtype == jnp.float16:
            np.testing.assert_allclose(np.asarray(value), other, rtol=2**-10)
        elif name.endswith(".packed"):
            # Where a scale is the next float16, a weight at its threshold may differ.
            assert np.mean(np.asarray(value) != other) < 1e-3, name
        else:
            np.testing.assert_array_equal(np.asarray(value), other, err_msg=name)


def test_a_pipeline_draws_with_it(rounded):
    pipe = FluxPipeline.from_pretrained(rounded)
    assert isinstance(pipe.transformer.double_blocks[0].img_attn.qkv, TernaryLinear)
    images = pipe("a red circle", num_inference_steps=2, seed=0, output_type="np").images
    assert np.asarray(images).shape == (1, 32, 32, 3)
    assert np.isfinite(np.asarray(images)).all()


def test_float32(rounded):
    model = transformer(rounded, dtype=jnp.float32)
    dtypes = {name: value.dtype.name for name, value in to_flat(model).items()}
    assert dtypes["img_in.weight"] == "float32"
    assert dtypes["double_blocks.0.img_attn.qkv.bias"] == "float32"
    assert dtypes["double_blocks.0.img_attn.qkv.scale"] == "float16"
    assert dtypes["double_blocks.0.img_attn.qkv.packed"] == "uint8"
    assert model.double_blocks[0].img_attn.qkv.dtype == jnp.float32


def test_sharded(rounded):
    mesh = make_mesh(fsdp=2, tensor=2)
    model = transformer(rounded, mesh=mesh)
    packed = model.double_blocks[0].img_attn.qkv.packed[...]
    assert packed.sharding.spec == jax.sharding.PartitionSpec(("tensor", "fsdp"), None)
    assert_same_arrays(model, transformer(rounded))


def test_loading_never_makes_a_dense_weight(rounded, monkeypatch):
    """Every array that reaches a device is one of the packed module's."""
    seen = []
    real = jax.make_array_from_callback

    def spy(shape, *arguments):
        seen.append(tuple(shape))
        return real(shape, *arguments)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    with open_checkpoint(rounded) as checkpoint:
        monkeypatch.setattr(checkpoint, "dense", None)
        module = checkpoint.load_module(jnp.bfloat16)
        block = checkpoint.shapes["double_blocks.0.img_mlp.in_layer.weight"]
    assert sorted(seen) == sorted(value.shape for value in to_flat(module).values())
    assert block not in seen


def test_contents(teacher, rounded):
    dense, ternary = (inspect_checkpoint(p).components["transformer"] for p in (teacher, rounded))
    assert ternary.parameters == dense.parameters
    assert ternary.config == dense.config
    assert ternary.nbytes < (rounded / "transformer" / FILE).stat().st_size < dense.nbytes


def test_the_rest_is_the_teachers(teacher, rounded):
    parts = ["text_encoder", "text_encoder_2", "vae"]
    one, other = (load_checkpoint(path, components=parts) for path in (teacher, rounded))
    assert one.scheduler == other.scheduler
    assert one.tokenizer_paths.keys() == other.tokenizer_paths.keys()
    for name in parts:
        assert_same_arrays(one.modules[name], other.modules[name])


def test_convert_decodes_it(rounded, tmp_path):
    """`python -m convert` makes a dense checkpoint of it, which draws the same."""
    engine.convert(rounded, tmp_path / "dense", to="diffusers", components=["transformer"])
    dense, packed = transformer(tmp_path / "dense"), transformer(rounded)
    for name, layer in linears(packed, TernaryLinear).items():
        expected = layer.dense_weight().astype(jnp.bfloat16)
        found = to_flat(dense)[f"{name}.weight"]
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=name)


def test_full_size_is_nine_times_smaller():
    """FLUX.1-dev, a scale per output, from the shapes alone."""
    shapes = dense_shapes(FluxConfig.dev())
    layers = select([n.removesuffix(".weight") for n in shapes if n.endswith(".weight")], Policy())
    stored = expected_tensors(shapes, layers, QuantConfig())
    nbytes = sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in stored.values())
    dense = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert dense / nbytes > 9.3


def test_abstract_module_holds_no_arrays():
    config = FluxConfig.tiny()
    module = abstract_ternary(config, ["single_blocks.0.linear1"], QuantConfig(), jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(module))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_the_documented_reader_reads_it(rounded):
    """The Python of docs/ternary_format.md, word for word."""
    text = (ROOT / "docs" / "ternary_format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(code, names)
    with open_checkpoint(rounded) as checkpoint:
        for layer in checkpoint.layers:
            columns = checkpoint.shapes[f"{layer}.weight"][1]
            weight = names["read_weight"](rounded / "transformer" / FILE, layer, columns)
            found = checkpoint.dense(f"{layer}.weight")
            np.testing.assert_array_equal(weight.astype(found.dtype), found, err_msg=layer)


# Damage. Every message names the tensor, or the field of the config.

CODES = "double_blocks.0.img_attn.qkv.ternary"


def position(file, name):
    """Where a tensor's bytes are."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def put(file, at, value):
    data = bytearray(file.read_bytes())
    data[at] = value
    file.write_bytes(data)


def edit_config(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", [CODES, "img_in.weight", "double_blocks.0.img_attn.qkv.scale"])
def test_a_flipped_bit_is_found(copy, name):
    start, _ = position(copy / FILE, name)
    put(copy / FILE, start + 3, (copy / FILE).read_bytes()[start + 3] ^ 1)
    with pytest.raises(UserError, match=f"tensor `{name}` is damaged: its checksum is"):
        transformer(copy.parent)


@pytest.mark.parametrize("mesh", [None, {"tensor": 2}])
def test_codes_decoded_by_a_device_are_the_same(rounded, monkeypatch, mesh):
    """On a CPU the host decodes: here a device is made to, as on a GPU."""
    options = {} if mesh is None else {"mesh": make_mesh(**mesh)}
    expected = transformer(rounded, **options)
    asked = []

    def decoder(place):
        asked.append(place)
        return jax.devices()[0]

    monkeypatch.setattr(checkpoint, "_decoder", decoder)
    found = transformer(rounded, **options)
    assert asked
    assert_same_arrays(found, expected)
    for name, value in to_flat(found).items():
        assert value.sharding == to_flat(expected)[name].sharding, name


def test_a_byte_above_242_is_found_even_with_its_checksum(copy):
    start, stop = position(copy / FILE, CODES)
    put(copy / FILE, start, 250)
    crc = zlib.crc32((copy / FILE).read_bytes()[start:stop])
    edit_config(copy, lambda quantization: quantization["crc32"].update({CODES: f"{crc:08x}"}))
    with pytest.raises(UserError, match=f"tensor `{CODES}`: byte 250 at row 0, column 0"):
        transformer(copy.parent)


def test_a_truncated_file_is_refused(copy):
    data = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(data[:-5])
    with pytest.raises(UserError, match="truncated: tensor `.*ternary` ends at byte"):
        transformer(copy.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "ternary format version 2, this program reads 1"),
        ({"quant_method": "gguf"}, "a transformer quantised by 'gguf' is not read"),
        ({"granularity": "row"}, "quantization_config: granularity must be one of"),
        ({"granularity": "tensor"}, r"tensor `.*scale` is float16 \(\d+,\), expected float16 \(\)"),
        ({"group_size": 64}, "group_size must be 128, got 64"),
        ({"rank": 3}, "tensor `double_blocks.0.img_attn.proj.low_rank_a` is missing"),
        ({"crc32": None}, "quantization_config has no table `crc32`"),
        ({"crc32": {}}, "tensor `.*` has no checksum"),
        ({"crc32": {"a": "xyz"}}, "a checksum or error is no number"),
    ],
)
def test_another_config_is_refused(copy, change, message):
    edit_config(copy, lambda quantization: quantization.update(change))
    with pytest.raises(UserError, match=message):
        transformer(copy.parent)


def test_a_config_that_is_not_whole_is_named(copy):
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": "two"}))
    with pytest.raises(UserError, match=r"config\.json: transformer config: depth must be"):
        transformer(copy.parent)


def rewrite(folder, change):
    """The file again, its tensors changed by `change`."""
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.stored}
    change(tensors)
    (folder / FILE).unlink()
    stored = {name: Spec(values.shape, values.dtype) for name, values in tensors.items()}
    with TensorFile(folder / FILE, stored) as file:
        for name, values in tensors.items():
            file.write(name, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("img_in.bias"), "tensor `img_in.bias` is missing"),
        (lambda t: t.update(extra=t["img_in.bias"]), "tensor `extra` is not expected"),
        (
            lambda t: t.update({CODES: t[CODES][:, 1:]}),
            rf"tensor `{CODES}` is uint8 \(96, 6\), expected uint8 \(96, 7\)",
        ),
        (
            lambda t: t.update({"final_layer.x.ternary": t[CODES]}),
            f"{FILE}: tensor `final_layer.x.ternary` belongs to no linear of this model",
        ),
    ],
)
def test_other_tensors_are_refused(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(UserError, match=message):
        transformer(copy.parent)


def test_a_missing_file_is_refused(copy):
    (copy / FILE).unlink()
    with pytest.raises(UserError, match=f"{FILE}: cannot be read"):
        transformer(copy.parent)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_refused(teacher, tmp_path, value):
    model = student(teacher, QuantConfig())
    layer = model.single_blocks[0].linear1
    layer.weight[...] = layer.weight[...].at[3, 1].set(value)
    with pytest.raises(UserError, match="layer `single_blocks.0.linear1` has a scale that is not"):
        save_checkpoint(tmp_path / "m", model, rest=teacher)
    assert not (tmp_path / "m").exists()


def test_layers_of_two_kinds_are_refused(teacher, tmp_path):
    model = student(teacher, QuantConfig())
    other = QuantConfig(granularity="tensor")
    replace_linears(model, ["img_in"], lambda n, dense: TernaryLinear.from_linear(dense, other))
    with pytest.raises(UserError, match="layers of one kind, this transformer has 2 kinds"):
        save_checkpoint(tmp_path / "m", model, rest=teacher)
    assert not (tmp_path / "m").exists()


def test_what_is_no_ternary_transformer_is_refused(teacher, tmp_path):
    with pytest.raises(UserError, match=r"FluxTransformer has no ternary linear.*flux_jax\.save"):
        save_checkpoint(tmp_path / "m", transformer(teacher), rest=teacher)
    other = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="holds a FluxTransformer, got Linear; save the"):
        # Without the tests' own check of types.
        inspect.unwrap(save_checkpoint)(tmp_path / "m", other, rest=teacher)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [FakeTernaryLinear, TernaryLinear])
def test_a_path_may_be_text_and_a_module_is_inspected_as_it_would_be_stored(
    teacher, tmp_path, monkeypatch, kind
):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = student(teacher, QuantConfig(granularity="group128", activation_bits=8), kind)
    save_checkpoint("~/m", model, rest=str(teacher))
    stored = inspection.inspect_checkpoint(str(tmp_path / "m"))
    assert inspection.inspect_checkpoint("~/m") == stored
    assert inspection.inspect_checkpoint(model) == stored


@pytest.mark.parametrize("kind", [FakeTernaryLinear, TernaryLinear])
def test_what_its_config_does_not_describe_is_refused(teacher, tmp_path, kind):
    """As after a block was taken out by hand."""
    model = student(teacher, QuantConfig(), kind)
    model.double_blocks = nnx.List([])
    with pytest.raises(UserError, match=r"parameters of the transformer, as `double_blocks\.0\."):
        save_checkpoint(tmp_path / "m", model, rest=teacher)
    assert list(tmp_path.iterdir()) == []


def test_what_is_stored_of_a_lora_is_nothing(teacher):
    model = student(teacher, QuantConfig(), TernaryLinear)
    block = model.double_blocks[0]
    rows, columns = dense_shapes(model.config)["double_blocks.0.img_attn.qkv.weight"]
    qkv, a, b = block.img_attn.qkv, jnp.ones((1, columns)), jnp.ones((rows, 1))
    block.img_attn.qkv = LoRALinear(qkv, a, b)
    with pytest.raises(UserError, match="has LoRAs beside its weights: unload them first"):
        inspection.inspect_checkpoint(model)


def test_a_dense_module_has_nothing_to_inspect(teacher):
    with pytest.raises(UserError, match="this FluxTransformer has no ternary linear"):
        inspection.inspect_checkpoint(transformer(teacher))


def test_it_is_loaded_onto_the_default_device(rounded):
    device = jax.devices()[3]
    with jax.default_device(device), open_checkpoint(rounded) as checkpoint:
        module = checkpoint.load_module(jnp.bfloat16)
    assert {place for value in to_flat(module).values() for place in value.devices()} == {device}


def test_an_existing_target_is_kept(teacher, rounded):
    before = (rounded / "transformer" / FILE).read_bytes()
    with pytest.raises(UserError, match=r"exists already; --force replaces it .*force=True\)"):
        quantize_checkpoint(teacher, rounded, QuantConfig(), Policy())
    assert (rounded / "transformer" / FILE).read_bytes() == before


@pytest.mark.parametrize("part", ["", "transformer"])
def test_rounding_does_not_replace_the_source(teacher, tmp_path, part):
    """Nothing makes the dense weights of the rounded ones again."""
    source = tmp_path / "m"
    shutil.copytree(teacher, source)
    with pytest.raises(UserError, match="the target would replace the source"):
        quantize_checkpoint(source / part, source, force=True)
    assert (source / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


def test_rounding_makes_no_branch(teacher, tmp_path):
    with pytest.raises(UserError, match="rank must be 0"):
        quantize_checkpoint(teacher, tmp_path / "m", QuantConfig(rank=1), Policy())


def test_tensor_file_refuses_what_was_not_announced(tmp_path):
    stored = {"a": expected_tensors({"a": (2, 3)}, [], QuantConfig())["a"]}
    with TensorFile(tmp_path / "f", stored) as file:
        with pytest.raises(ValueError, match="tensor 'b' .*: expected None, once"):
            file.write("b", np.zeros(1, np.uint8))
        file.write("a", np.zeros((2, 3), stored["a"].dtype))
        with pytest.raises(ValueError, match="tensor 'a' .*, once"):
            file.write("a", np.zeros((2, 3), stored["a"].dtype))
    with pytest.raises(ValueError, match="never written: a"), TensorFile(tmp_path / "g", stored):
        pass


def test_a_full_disk_leaves_nothing(teacher, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk full while writing"):
        quantize_checkpoint(teacher, tmp_path / "m", QuantConfig(), Policy())
    assert not list(tmp_path.iterdir())


def test_width_of_the_smallest_layer():
    assert base3.base3_width(32) == 7
