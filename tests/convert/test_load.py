"""Loading straight onto devices, from every layout, and saving from them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert import load as load_module
from convert.engine import convert
from flux_jax.checkpoint import load_checkpoint, save_checkpoint
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.sharding import make_mesh
from flux_jax.tree import to_flat
from tests.convert.models import CONFIGS, diffusers_folder, safetensors_in
from tests.random_module import random_module

WIDTHS = ("transformer", "vae")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A diffusers folder, a Flax checkpoint and single files of one model; and its parameters."""
    root = tmp_path_factory.mktemp("models")
    parameters = diffusers_folder(root / "diffusers", WIDTHS, shard_bytes=2_000_000)
    convert(root / "diffusers", root / "flax")
    convert(root / "diffusers", root / "bfl", to="bfl")
    return root, parameters


def assert_loaded(module, expected, dtype=ml_dtypes.bfloat16):
    found = to_flat(module)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array.astype(dtype), err_msg=name)


@pytest.mark.parametrize("layout", ["diffusers", "flax", "bfl"])
@pytest.mark.parametrize("spread", [False, True], ids=["one-device", "mesh"])
def test_every_layout_loads_onto_its_devices(made, layout, spread):
    root, parameters = made
    mesh = make_mesh(fsdp=2, tensor=2) if spread else None
    checkpoint = load_checkpoint(root / layout, mesh=mesh)
    assert checkpoint.path == root / layout
    assert checkpoint.scheduler is not None
    assert checkpoint.configs["transformer"] == CONFIGS["transformer"]
    for name in WIDTHS:
        assert_loaded(checkpoint.modules[name], parameters[name])
    qkv = to_flat(checkpoint.modules["transformer"])["double_blocks.1.img_attn.qkv.weight"]
    assert len(qkv.sharding.device_set) == (4 if spread else 1)
    if spread:
        assert qkv.sharding.spec == jax.sharding.PartitionSpec(("tensor", "fsdp"), None)
        assert qkv.addressable_shards[0].data.shape == (qkv.shape[0] // 4, qkv.shape[1])


@pytest.mark.parametrize("layout", ["diffusers", "flax"])
def test_a_dtype_is_cast_to(made, layout):
    root, parameters = made
    checkpoint = load_checkpoint(root / layout, components=["vae"], dtype=jnp.float32)
    assert set(checkpoint.modules) == {"vae"}
    assert_loaded(checkpoint.modules["vae"], parameters["vae"], np.float32)


def test_no_components_give_the_rest(made):
    root, _ = made
    for layout in ("diffusers", "flax"):
        checkpoint = load_checkpoint(str(root / layout), components=[])
        assert checkpoint.modules == {}
        assert checkpoint.scheduler == load_checkpoint(root / layout, components=[]).scheduler
        assert set(checkpoint.tokenizer_paths) == {"tokenizer", "tokenizer_2"}


def test_few_tensors_are_on_the_host_at_a_time(made, monkeypatch):
    """With room for none, every transfer is waited for before the next tensor is read."""
    root, parameters = made
    monkeypatch.setattr(load_module, "_HOST_BYTES", 0)
    loaded = load_checkpoint(root / "diffusers", components=["vae"])
    assert_loaded(loaded.modules["vae"], parameters["vae"])


def test_a_flax_checkpoint_with_a_missing_parameter_is_named(made, tmp_path):
    root, _ = made
    convert(root / "flax", tmp_path / "broken", components=["vae"], dtype="fp32")
    vae = tmp_path / "broken" / "vae"
    (vae / "decoder.conv_in.weight" / "0.0.0.0").unlink()
    with pytest.raises(UserError, match="`decoder.conv_in.weight`: chunk 0.0.0.0 is missing"):
        load_checkpoint(tmp_path / "broken")
    metadata = json.loads((vae / "_METADATA").read_text())
    metadata["tree_metadata"].pop("('decoder', 'conv_in', 'weight')")
    (vae / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="1 problem: tensor `decoder.conv_in.weight` is missing"):
        load_checkpoint(tmp_path / "broken")


def test_modules_are_saved_and_loaded(made, tmp_path):
    root, parameters = made
    before = load_checkpoint(root / "flax", mesh=make_mesh(fsdp=2))
    target = tmp_path / "saved"
    save_checkpoint(
        target,
        before.modules,
        scheduler=SchedulerConfig.schnell(),
        tokenizers=before.tokenizer_paths,
    )
    after = load_checkpoint(target)
    assert after.scheduler == SchedulerConfig.schnell()
    assert after.configs == before.configs
    assert set(after.tokenizer_paths) == {"tokenizer", "tokenizer_2"}
    for name in WIDTHS:
        assert_loaded(after.modules[name], parameters[name])
    with pytest.raises(UserError, match="saved: exists already"):
        save_checkpoint(target, before.modules)
    save_checkpoint(target, {"vae": before.modules["vae"]}, force=True)
    assert set(load_checkpoint(target).modules) == {"vae"}
    convert(target, tmp_path / "exported", to="diffusers", dtype="keep")
    assert len(safetensors_in(tmp_path / "exported")) == 1


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown component unet"):
        save_checkpoint(tmp_path / "x", {"unet": nnx.Module()})
    with pytest.raises(UserError, match="vae: a module without `config` cannot be saved"):
        save_checkpoint(tmp_path / "x", {"vae": nnx.Module()})
    ternary = load_checkpoint("tiny-ternary", components=["transformer"]).modules
    with pytest.raises(UserError, match=r"not those of a dense transformer.*ternary\.save_check"):
        save_checkpoint(tmp_path / "x", ternary)
    assert list(tmp_path.iterdir()) == []


def test_a_path_may_begin_with_the_home(made, tmp_path, monkeypatch):
    vae = load_checkpoint(made[0] / "flax", components=["vae"]).modules
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_checkpoint("~/saved", vae)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert set(load_checkpoint("~/saved").modules) == {"vae"}


def test_what_float16_cannot_hold_is_an_error_from_every_layout(tmp_path):
    """Orbax's own cast would make an infinity of it."""
    module = nnx.merge(*nnx.split(random_module("vae", CONFIGS["vae"], jnp.float32)))
    save_checkpoint(tmp_path / "flax", {"vae": module})
    assert load_checkpoint(tmp_path / "flax", dtype=jnp.float16).modules["vae"] is not None
    weight = module.decoder.conv_in.weight
    weight.set_value(weight[...].at[0, 0, 0, 0].set(1e6))
    save_checkpoint(tmp_path / "wide", {"vae": module})
    convert(tmp_path / "wide", tmp_path / "diffusers", to="diffusers", dtype="fp32")
    for layout in ("wide", "diffusers"):
        with pytest.raises(UserError, match="`decoder.conv_in.weight`.*beyond the range"):
            load_checkpoint(tmp_path / layout, dtype=jnp.float16)
