"""There and back again, bit for bit, in every layout and dtype."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from convert import engine
from convert.engine import convert
from convert.source import open_source, parameters
from convert.tensors import FLOAT32, read_whole
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from tests.convert.models import (
    CONFIGS,
    diffusers_folder,
    random_parameters,
    read_tensors,
    safetensors_in,
    stored_tensors,
    write_tensors,
)

BF16 = np.dtype(ml_dtypes.bfloat16)


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def all_parameters(path):
    with open_source(path) as source:
        out = {}
        for name, component in source.components.items():
            reader = parameters(name, component, None).reader
            out |= {f"{name}/{tensor}": read_whole(reader, tensor) for tensor in reader.specs}
        return out


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    """A diffusers pipeline in bf16, the transformer in shards."""
    folder = tmp_path_factory.mktemp("models") / "diffusers"
    diffusers_folder(folder, shard_bytes=2_000_000)
    return folder


@pytest.fixture(scope="module")
def flax(diffusers, tmp_path_factory):
    target = tmp_path_factory.mktemp("models") / "flax"
    summary = convert(diffusers, target, dtype="keep", verify=True)
    assert summary.components == ("transformer", "text_encoder", "text_encoder_2", "vae")
    assert summary.verified == 269
    return target


def test_diffusers_to_flax_and_back(diffusers, flax, tmp_path):
    convert(flax, tmp_path / "back", to="diffusers", dtype="keep", shard_bytes=2_000_000)
    assert_same_tensors(
        read_tensors(*safetensors_in(tmp_path / "back")), read_tensors(*safetensors_in(diffusers))
    )
    for config in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        before = json.loads((diffusers / config / "config.json").read_text())
        after = json.loads((tmp_path / "back" / config / "config.json").read_text())
        assert before.items() <= after.items()
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        before = json.loads((diffusers / name).read_text())
        assert json.loads((tmp_path / "back" / name).read_text()) == before
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["text_encoder_2"] == ["transformers", "T5EncoderModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_flax_to_single_files_and_back(flax, tmp_path):
    convert(flax, tmp_path / "bfl", to="bfl", dtype="keep", verify=True)
    assert [file.name for file in safetensors_in(tmp_path / "bfl")] == [
        "ae.safetensors",
        "clip_l.safetensors",
        "flux1.safetensors",
        "t5xxl.safetensors",
    ]
    convert(tmp_path / "bfl", tmp_path / "back", dtype="keep")
    assert_same_tensors(all_parameters(tmp_path / "back"), all_parameters(flax))
    before = json.loads((flax / "config.json").read_text())["components"]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["components"] == before


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
def test_a_published_single_file_to_flax_and_back(tmp_path, component, dtype):
    """No config in the file: it is told from the shapes."""
    tensors = stored_tensors(component, random_parameters(component, dtype), "bfl")
    one = next(iter(tensors))
    tensors[one] = tensors[one].astype(np.float32)  # mixed dtypes are kept, too
    write_tensors(tmp_path / "in.safetensors", tensors)
    convert(tmp_path / "in.safetensors", tmp_path / "flax", dtype="keep")
    options = {"to": "bfl", "dtype": "keep", "components": [component]}
    convert(tmp_path / "flax", tmp_path / "out.safetensors", **options)
    assert_same_tensors(
        read_tensors(tmp_path / "out.safetensors"), read_tensors(tmp_path / "in.safetensors")
    )
    with open_source(tmp_path / "flax") as source:
        guessed = source.components[component].config
    # The one field that changes nothing in the model and is not in the weights.
    known = {"sample_size": CONFIGS["vae"].sample_size} if component == "vae" else {}
    assert dataclasses.replace(guessed, **known) == CONFIGS[component]


def test_diffusers_straight_to_single_files(diffusers, tmp_path):
    convert(diffusers, tmp_path / "bfl", to="bfl", dtype="keep")
    assert_same_tensors(all_parameters(tmp_path / "bfl"), all_parameters(diffusers))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("bf16", BF16), ("fp16", np.float16), ("fp32", np.float32)]
)
def test_a_dtype_is_rounded_to_once(diffusers, tmp_path, dtype, numpy_dtype):
    convert(diffusers, tmp_path / "flax", dtype=dtype, components=["text_encoder"])
    before = random_parameters("text_encoder")
    found = all_parameters(tmp_path / "flax")
    expected = {
        f"text_encoder/{name}": array.astype(np.float32).astype(numpy_dtype)
        for name, array in before.items()
    }
    assert_same_tensors(found, expected)


def test_a_value_that_float16_cannot_hold_is_named(tmp_path):
    tensors = stored_tensors("vae", random_parameters("vae"), "bfl")
    tensors["decoder.conv_in.bias"][3] = 1e6
    write_tensors(tmp_path / "ae.safetensors", tensors)
    with pytest.raises(
        UserError, match="`decoder.conv_in.bias` has values beyond .* choose bfloat"
    ):
        convert(tmp_path / "ae.safetensors", tmp_path / "flax", dtype="fp16")


def test_only_the_components_asked_for(diffusers, tmp_path):
    summary = convert(diffusers, tmp_path / "flax", components=["vae", "text_encoder"])
    assert set(summary.components) == {"vae", "text_encoder"}
    content = json.loads((tmp_path / "flax" / "config.json").read_text())
    assert set(content["components"]) == {"vae", "text_encoder"}
    assert not (tmp_path / "flax" / "transformer").exists()


def test_a_folder_of_one_component(diffusers, tmp_path):
    convert(diffusers / "vae", tmp_path / "flax", dtype="keep")
    assert_same_tensors(
        all_parameters(tmp_path / "flax"),
        {f"vae/{name}": array for name, array in random_parameters("vae").items()},
    )


def all_in_one(scaled: bool):
    """The tensors of a file with everything, as ComfyUI's are, the transformer in float8."""
    e4m3 = np.dtype(ml_dtypes.float8_e4m3fn)
    tensors, expected = {}, {}
    for component, prefix in (
        ("transformer", "model.diffusion_model."),
        ("vae", "vae."),
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
    ):
        ours = random_parameters(component, np.float32)
        stored = stored_tensors(component, ours, "bfl")
        for name, array in stored.items():
            if component == "transformer" and array.ndim == 2:
                scale = np.float32(np.abs(array).max() / 448)
                array = (array / scale).astype(e4m3) if scaled else array.astype(e4m3)
                if scaled:
                    layer = name.removesuffix("weight")
                    tensors[f"{prefix}{layer}scale_weight"] = np.array(scale)
                expected[name] = array.astype(np.float32) * (scale if scaled else 1)
            tensors[prefix + name] = array
    tensors["text_encoders.clip_l.logit_scale"] = np.ones((), np.float32)
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = np.ones((4, 4), np.float32)
    tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = tensors[
        "text_encoders.t5xxl.transformer.shared.weight"
    ]
    if scaled:
        tensors["model.diffusion_model.scaled_fp8"] = np.zeros(0, e4m3)
    return tensors, expected


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_one_float8_file_with_everything(tmp_path, scaled):
    tensors, expected = all_in_one(scaled)
    write_tensors(tmp_path / "all.safetensors", tensors)
    with open_source(tmp_path / "all.safetensors") as source:
        assert source.scheduler == SchedulerConfig.dev()
        assert tuple(source.components) == ("transformer", "text_encoder", "text_encoder_2", "vae")
        component = source.components["transformer"]
        reader = parameters("transformer", component, FLOAT32).reader
        for name in ("img_in.weight", "single_blocks.2.linear1.weight"):  # the same in both layouts
            np.testing.assert_array_equal(read_whole(reader, name), expected[name])
    summary = convert(tmp_path / "all.safetensors", tmp_path / "flax")
    dropped = {d[:2] for d in summary.dropped}
    assert {
        ("text_encoder_2", "encoder.embed_tokens.weight"),
        ("text_encoder", "text_encoders.clip_l.logit_scale"),
        ("text_encoder", "text_encoders.clip_l.transformer.text_projection.weight"),
    } <= dropped
    assert {name.split("/")[0] for name in all_parameters(tmp_path / "flax")} == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
    }


def test_tied_weights_that_differ_are_an_error(tmp_path):
    tensors = stored_tensors("text_encoder_2", random_parameters("text_encoder_2"), "bfl")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"][::-1].copy()
    write_tensors(tmp_path / "t5.safetensors", tensors)
    with pytest.raises(UserError, match="`encoder.embed_tokens.weight` and `shared.weight` differ"):
        convert(tmp_path / "t5.safetensors", tmp_path / "flax")


def test_an_integer_weight_is_named(tmp_path):
    tensors = stored_tensors("vae", random_parameters("vae"), "bfl")
    name = "decoder.conv_in.weight"
    tensors[name] = np.zeros(tensors[name].shape, np.int8)
    write_tensors(tmp_path / "ae.safetensors", tensors)
    with pytest.raises(UserError, match=f"`{name}` has dtype int8, expected bfloat16, float16"):
        convert(tmp_path / "ae.safetensors", tmp_path / "flax")


def test_verify_notices_a_flipped_bit(diffusers, tmp_path, monkeypatch):
    write = engine.write_flax

    def write_and_damage(stage, *args):
        write(stage, *args)
        chunk = stage / "vae" / "decoder.conv_in.weight" / "0.0.0.0"
        data = bytearray(chunk.read_bytes())
        data[7] ^= 1
        chunk.write_bytes(data)

    monkeypatch.setattr(engine, "write_flax", write_and_damage)
    with pytest.raises(UserError, match="1 of 120 tensors differ .*`decoder.conv_in.weight` of"):
        convert(diffusers, tmp_path / "flax", components=["vae"], verify=True)
    assert list(tmp_path.iterdir()) == []


def test_one_file_holds_one_component(flax, tmp_path):
    with pytest.raises(UserError, match="one file holds one component, there are transformer, te"):
        convert(flax, tmp_path / "out.safetensors", to="bfl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["flax", "diffusers"])
def test_a_folder_does_not_take_the_place_of_a_file(diffusers, tmp_path, to):
    file = write_tensors(tmp_path / "ae.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=f"names a single file, but '{to}' is a folder; .*--to bfl"):
        convert(diffusers, file, to=to, components=["vae"], force=True)
    assert file.is_file()


def test_the_source_is_never_replaced(flax, tmp_path):
    inner = tmp_path / "all" / "vae.safetensors"
    inner.parent.mkdir()
    # With our note, which makes a folder of single files one that --force may replace.
    tensors = stored_tensors("vae", random_parameters("vae"), "bfl")
    write_tensors(inner, tensors, {"flux_jax.config": "{}"})
    for src, dst in ((inner, inner), (inner, inner.parent), (flax, flax / ".")):
        with pytest.raises(UserError, match="the target would replace the source"):
            convert(src, dst, force=True, dtype="fp32", to="bfl")
    assert inner.exists()
    before = inner.read_bytes()
    with pytest.raises(UserError, match="the target would replace what is in the source"):
        convert(inner.parent, inner, force=True, dtype="fp32", to="bfl", components=["vae"])
    assert inner.read_bytes() == before


def test_single_files_of_another_make_are_never_replaced(diffusers, tmp_path):
    """Only what carries our note is ours to replace: anybody may keep other files in a folder."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = {"components": ["vae"], "to": "bfl", "force": True}
    convert(diffusers, ours, **options)
    convert(diffusers, ours, **options)
    theirs.mkdir()
    write_tensors(theirs / "lora.safetensors", {"lora_up": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="no checkpoint that --force would replace"):
        convert(diffusers, theirs, **options)
    assert [file.name for file in theirs.iterdir()] == ["lora.safetensors"]


def test_a_pipeline_of_another_model_is_never_replaced(diffusers, tmp_path):
    index = tmp_path / "sdxl" / "model_index.json"
    index.parent.mkdir()
    for text in ('{"_class_name": "StableDiffusionXLPipeline"}', "{"):
        index.write_text(text)
        with pytest.raises(UserError, match="no checkpoint that --force would replace"):
            convert(diffusers, index.parent, components=["vae"], force=True)
        assert index.read_text() == text


def test_the_home_folder_may_be_written_as_a_tilde(diffusers, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(diffusers, "~/flax", components=["text_encoder"]).path == tmp_path / "flax"
    assert (tmp_path / "flax" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32, keep, got 'int8'"),
        ({"to": "onnx"}, "to must be one of flax, diffusers, bfl, got 'onnx'"),
        ({"components": ["unet"]}, "unknown component unet; there are transformer"),
        ({"dtype": "keep"}, "is a Flax checkpoint already"),
    ],
)
def test_options_that_make_no_sense_are_named(flax, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        convert(flax, tmp_path / "out", **options)


def test_flax_to_flax_in_another_dtype(flax, tmp_path):
    convert(flax, tmp_path / "out", dtype="fp32", components=["text_encoder_2"])
    assert {a.dtype.name for a in all_parameters(tmp_path / "out").values()} == {"float32"}


def test_progress_counts_every_byte(diffusers, tmp_path):
    told: list[int] = []
    done: list[int] = []
    options = {"on_start": told.append, "on_bytes": done.append, "verify": True}
    summary = convert(diffusers, tmp_path / "flax", components=["vae"], **options)
    assert told == [2 * summary.nbytes] == [sum(done)]
