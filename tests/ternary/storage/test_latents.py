"""Latent weights on disk: round trips, what is read when, and damage."""

import json
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flux_jax.errors import UserError
from ternary.config import QuantConfig
from ternary.policy import Policy
from ternary.storage.latents import INDEX, load_latents
from tests.ternary.latents_folder import write_latents

QUANT = QuantConfig(granularity="group128", rank=2, refit_steps=3, learned_scale=True)
POLICY = Policy(include=("double_blocks.*",), exclude=("*.txt_mod.lin",))


SHAPES = {
    "embedders": {"img_in.weight": (4, 3)},
    "double_blocks.0": {
        "double_blocks.0.img_attn.qkv.weight": (6, 4),
        "double_blocks.0.img_attn.qkv.log_scale": (6, 1),
    },
    "double_blocks.10": {"double_blocks.10.img_attn.qkv.weight": (6, 4)},
    "single_blocks.0": {"single_blocks.0.linear1.bias": (5,)},
    "final_layer": {"final_layer.linear.weight": (2, 2)},
}


def flat():
    rng = np.random.default_rng(0)
    shapes = {name: shape for part in SHAPES.values() for name, shape in part.items()}
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    values["single_blocks.0.linear1.bias"] = values["single_blocks.0.linear1.bias"].astype(
        ml_dtypes.bfloat16
    )
    return values


@pytest.fixture
def folder(tmp_path):
    values = flat()
    parts = {
        part: {name: jnp.asarray(values[name]) for name in names} for part, names in SHAPES.items()
    }
    return write_latents(tmp_path / "checkpoint" / "latents", parts, QUANT, POLICY)


def test_round_trip(folder):
    for place in (folder, folder.parent):
        found, quant, policy = load_latents(place)
        assert (quant, policy) == (QUANT, POLICY)
        with found:
            assert set(found) == set(flat())
            assert len(found) == len(flat())
            for name, value in flat().items():
                assert found[name].dtype == value.dtype
                assert found.spec(name) == (value.shape, value.dtype)
                np.testing.assert_array_equal(found[name], value)


def test_each_part_is_a_file(folder):
    assert {path.name for path in folder.iterdir()} == {
        "double_blocks.0.safetensors",
        "double_blocks.10.safetensors",
        "embedders.safetensors",
        "final_layer.safetensors",
        INDEX,
        "single_blocks.0.safetensors",
    }


def test_a_damaged_tensor_is_found_when_it_is_read(folder):
    path = folder / "double_blocks.0.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    found, *_ = load_latents(folder)
    # The others are as good as before.
    np.testing.assert_array_equal(found["img_in.weight"], flat()["img_in.weight"])
    with pytest.raises(UserError, match="tensor `double_blocks.0.*is damaged: its checksum is"):
        [found[name] for name in found]


def test_a_truncated_or_missing_file_is_refused(folder):
    path = folder / "double_blocks.0.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match="truncated: tensor `double_blocks.0"):
        load_latents(folder)
    path.unlink()
    with pytest.raises(UserError, match="double_blocks.0.safetensors"):
        load_latents(folder)


def change(folder, edit):
    content = json.loads((folder / INDEX).read_text())
    edit(content)
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format="gguf"), "format 'gguf', expected 'flux_ternary_latents'"),
        (lambda c: c.update(format_version=9), "latents version 9, this program reads 1"),
        (lambda c: c["quant"].update(granularity="row"), "granularity must be one of tensor"),
        (lambda c: c["quant"].update(more=1), "quant, policy or crc32 is missing or malformed"),
        (lambda c: c.pop("policy"), "quant, policy or crc32 is missing or malformed"),
        (
            lambda c: c["crc32"]["embedders"].update({"img_in.bias": "0"}),
            "tensor `img_in.bias` is missing; make the latents again",
        ),
        (
            lambda c: c["crc32"]["embedders"].clear(),
            "tensor `img_in.weight` is not expected",
        ),
        (lambda c: c["crc32"].update({"../x": {}}), "'../x' is no file of this folder"),
    ],
)
def test_another_index_is_refused(folder, edit, message):
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        load_latents(folder)


def test_a_folder_without_latents_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no latents.json; expected the latents of"):
        load_latents(tmp_path)


def test_the_checksums_are_those_of_the_values(folder):
    crc = json.loads((folder / INDEX).read_text())["crc32"]
    found = {name: int(value, 16) for part in crc.values() for name, value in part.items()}
    for name, value in flat().items():
        assert found[name] == zlib.crc32(value.tobytes())
