"""LoRA files: every ecosystem's names give the same changes; what does not fit is one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.lora import read_lora
from convert.maps.transformer import diffusers_map
from convert.safetensors_write import write_file
from flux_jax.checkpoint import load_lora, save_lora
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.lora import linear_shapes
from tests.convert.models import Arrays
from tests.lora_files import bfl_name, random_factors, small_lora, write_lora

CONFIG = FluxConfig(
    in_channels=8,
    vec_in_dim=16,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)
SHAPES = linear_shapes(CONFIG)
FACTORS = random_factors(SHAPES)


def changes(path: Path) -> dict[str, np.ndarray]:
    """What a file adds to each weight."""
    return {layer: change.b @ change.a for layer, change in read_lora(path, CONFIG).layers.items()}


def check(path: Path, factors=FACTORS, scale: float = 1.0) -> None:
    found = changes(path)
    assert found.keys() == factors.keys()
    for layer, (a, b) in factors.items():
        np.testing.assert_allclose(found[layer], scale * b @ a, rtol=1e-5, atol=1e-6)


def test_comfyui(tmp_path):
    check(write_lora(tmp_path / "lora.safetensors", FACTORS))


def test_kohya_with_alpha(tmp_path):
    tensors = {}
    for layer, (a, b) in FACTORS.items():
        stem = f"lora_unet_{bfl_name(layer).replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        tensors[f"{stem}.alpha"] = np.float32(1.5)
    save_file({name: np.asarray(t) for name, t in tensors.items()}, tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors", scale=0.5)


def test_parts_that_are_numbered(tmp_path):
    """OMI's names: Black Forest Labs', and diffusers' parts of them."""
    rng, tensors = np.random.default_rng(2), {}
    expected = np.zeros((7 * 32, 32), np.float32)
    for number, rows in enumerate((slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 224))):
        a = rng.standard_normal((2, 32)).astype(np.float32)
        b = rng.standard_normal((rows.stop - rows.start, 2)).astype(np.float32)
        expected[rows] = b @ a
        stem = f"diffusion_model.single_blocks.1.linear1.{number}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    a, b = FACTORS["img_in"]
    tensors |= {"diffusion_model.img_in.proj.lora_down.weight": a}
    tensors |= {"diffusion_model.img_in.proj.lora_up.weight": b}
    # Embeddings of words, and text encoders, are none of the transformer's.
    tensors |= {"bundle_emb.cat.clip_l": a, "clip_l.text_model.x.lora_down.weight": a}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = changes(tmp_path / "lora.safetensors")
    assert found.keys() == {"single_blocks.1.linear1", "img_in"}
    np.testing.assert_allclose(found["single_blocks.1.linear1"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["img_in"], b @ a, rtol=1e-5, atol=1e-6)


def test_differences_that_are_none_are_left_out(tmp_path):
    few = {PROJ: FACTORS[PROJ]}
    path = write_lora(tmp_path / "lora.safetensors", few)
    stem = f"diffusion_model.{PROJ}"
    zero = {
        f"{stem}.diff_b": np.zeros(32, np.float32),
        "img_in.diff": np.zeros((32, 8), np.float32),
    }
    tensors = {f"{stem}.lora_A.my-style.weight": A, f"{stem}.lora_B.my-style.weight": B}
    save_file({**tensors, **zero}, path)
    check(path, few)


@pytest.mark.parametrize(
    ("prefix", "down", "up", "underscores"),
    [
        ("lycoris_", ".lora_down.weight", ".lora_up.weight", True),
        ("transformer.", ".lora_A.weight", ".lora_B.weight", False),
        ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight", False),
        ("", ".lora.down.weight", ".lora.up.weight", False),
        ("lora_transformer_", ".lora_down.weight", ".lora_up.weight", True),
    ],
)
def test_names_of_diffusers(tmp_path, prefix, down, up, underscores):
    """q, k and v apart, each with a rank of its own; the last modulation's halves swapped."""
    rng = np.random.default_rng(1)
    tensors, expected = {}, {layer: np.zeros(shape, np.float32) for layer, shape in SHAPES.items()}
    for layer, shape in SHAPES.items():
        for number, piece in enumerate(diffusers_map(CONFIG).sources_of(f"{layer}.weight", shape)):
            rows, columns = piece.source_shape
            a = rng.standard_normal((2 + number, columns)).astype(np.float32)
            b = rng.standard_normal((rows, 2 + number)).astype(np.float32)
            stem = piece.source.removesuffix(".weight")
            stem = prefix + (stem.replace(".", "_") if underscores else stem)
            tensors |= {stem + down: a, stem + up: b}
            for source, target, count in piece.runs:
                expected[layer][target : target + count] = (b @ a)[source : source + count]
    assert f"{prefix}single_transformer_blocks" in "".join(tensors).replace("_0_", ".0.")
    save_file(tensors, tmp_path / "lora.safetensors")
    found = changes(tmp_path / "lora.safetensors")
    assert found.keys() == expected.keys()
    for layer in expected:
        np.testing.assert_allclose(found[layer], expected[layer], rtol=1e-5, atol=1e-5)
    assert not np.allclose(expected["final_layer.adaLN_modulation"][0], (b @ a)[0])


def test_a_part_of_the_rows_leaves_the_others_alone(tmp_path):
    a, b = random_factors({"q": (32, 32)})["q"]
    stem = "transformer.single_transformer_blocks.1.attn.to_k"
    save_file(
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, tmp_path / "lora.safetensors"
    )
    (found,) = changes(tmp_path / "lora.safetensors").items()
    assert found[0] == "single_blocks.1.linear1"
    np.testing.assert_allclose(found[1][32:64], b @ a, rtol=1e-5, atol=1e-6)
    assert not found[1][:32].any()
    assert not found[1][64:].any()


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=lambda t: t.__name__
)
def test_other_floats(tmp_path, dtype):
    rounded = {
        layer: tuple(f.astype(dtype).astype(np.float32) for f in factors)
        for layer, factors in FACTORS.items()
    }
    tensors = {}
    for layer, (a, b) in FACTORS.items():
        tensors[f"{bfl_name(layer)}.lora_A.weight"] = a.astype(dtype)
        tensors[f"{bfl_name(layer)}.lora_B.weight"] = b.astype(dtype)
    write_file(tmp_path / "lora.safetensors", Arrays(tensors), tensors, {})
    check(tmp_path / "lora.safetensors", rounded)


def test_text_encoders_are_left_out_with_a_warning(tmp_path, caplog):
    a, b = FACTORS["img_in"]
    names = {
        "img_in.lora_A.weight": a,
        "img_in.lora_B.weight": b,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": a,
    }
    save_file(names, tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING):
        assert changes(tmp_path / "lora.safetensors").keys() == {"img_in"}
    assert "2 tensors for text encoders are left out" in caplog.text


A, B = FACTORS["double_blocks.0.img_attn.proj"]
PROJ = "double_blocks.0.img_attn.proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{PROJ}.lora_A.weight": A}, f"1 problem: `{PROJ}` has no lora_B or lora_up"),
        ({f"{PROJ}.lora_up.weight": B}, f"1 problem: `{PROJ}` has no lora_A or lora_down"),
        (
            {f"{PROJ}.lora_A.weight": A[:2], f"{PROJ}.lora_B.weight": B},
            r"has factors \(2, 32\) and \(32, 3\), for a weight of 32 x 32 here",
        ),
        (
            {f"{PROJ}.lora_A.weight": A[:, :8], f"{PROJ}.lora_B.weight": B},
            r"has factors \(3, 8\) and \(32, 3\), for a weight of 32 x 32 here",
        ),
        (
            {f"{PROJ}.lora_A.weight": A[:0], f"{PROJ}.lora_B.weight": B[:, :0]},
            r"has factors \(0, 32\)",
        ),
        (
            {f"{PROJ}.lora_A.weight": A.astype(np.int8), f"{PROJ}.lora_B.weight": B},
            "is stored as int8, expected a float",
        ),
        (
            {f"{PROJ}.lora_A.weight": A, f"{PROJ}.lora_B.weight": B, f"{PROJ}.alpha": A[0]},
            r"has an alpha of shape \(32,\), expected one number",
        ),
        (
            {
                f"{PROJ}.lora_A.weight": A,
                f"{PROJ}.lora_B.weight": B,
                f"{PROJ}.alpha": np.asarray([np.nan], np.float32),
            },
            f"`{PROJ}.alpha` must be a finite number, got nan",
        ),
        (
            {
                f"{PROJ}.lora_A.one.weight": A,
                f"{PROJ}.lora_B.one.weight": B,
                f"{PROJ}.lora_A.two.weight": A,
            },
            "`.*lora_A.one.weight` and `.*lora_A.two.weight` are the same part of one change",
        ),
        (
            {
                f"{PROJ}.lora_A.weight": A,
                f"{PROJ}.lora_B.weight": B,
                f"diffusion_model.{PROJ}.lora_A.weight": A,
                f"diffusion_model.{PROJ}.lora_B.weight": B,
            },
            "` and `.*` change the same weight",
        ),
        (
            {
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": A,
                "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": B,
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": A,
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": np.tile(B, (3, 1)),
            },
            "` and `.*` change the same weight",
        ),
        (
            {"double_blocks.7.img_attn.proj.lora_A.weight": A},
            "`double_blocks.7.img_attn.proj` is no linear of this transformer",
        ),
        ({f"{PROJ}.weight": A}, f"tensor `{PROJ}.weight` is no part of a LoRA"),
        ({f"{PROJ}.lokr_w1": A}, "is of LoKr, which is not read here"),
        ({f"{PROJ}.hada_w1_a": A}, "is of LoHa"),
        ({f"{PROJ}.dora_scale": A}, "is of DoRA"),
        ({f"{PROJ}.lora_magnitude_vector.weight": A}, "is of DoRA"),
        ({f"{PROJ}.lora_B.bias": A}, "is of a LoRA with biases"),
        ({"text_encoder.a.lora_A.weight": A}, "none of its 1 tensors is of a transformer's LoRA"),
    ],
)
def test_what_is_refused(tmp_path, tensors, message):
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(path, CONFIG)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    for name, message in (
        ("lora.pt", "refused: a pickle"),
        ("lora.gguf", "is read from a .safetensors file"),
        ("absent.safetensors", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path / name, CONFIG)
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="truncated"):
        read_lora(tmp_path / "cut.safetensors", CONFIG)


def test_settings(tmp_path):
    """alpha over the rank, or over its root; PEFT's pattern is the end of a name."""
    few = {PROJ: FACTORS[PROJ]}
    settings = {"transformer.lora_alpha": 6, "transformer.use_rslora": False}
    path = tmp_path / "lora.safetensors"
    write_lora(path, few, metadata={"lora_adapter_metadata": json.dumps(settings)})
    check(path, few, scale=2.0)
    settings |= {"transformer.alpha_pattern": {"img_attn.proj": 9}}
    write_lora(path, few, metadata={"lora_adapter_metadata": json.dumps(settings)})
    check(path, few, scale=3.0)
    # A whole name, or the end of one.
    for pattern, scale in (("^" + PROJ, 4.0), ("^img_attn.proj", 2.0), ("mg_attn.proj", 2.0)):
        other = {**settings, "transformer.alpha_pattern": {pattern: 12}}
        write_lora(path, few, metadata={"lora_adapter_metadata": json.dumps(other)})
        check(path, few, scale=scale)
    settings["transformer.use_rslora"] = True
    write_lora(path, few, metadata={"lora_adapter_metadata": json.dumps(settings)})
    check(path, few, scale=9 / 3**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", "is no JSON object"),
        ("{", "lora_adapter_metadata`: not valid JSON"),
        ("[" * 100_000, "lora_adapter_metadata`: not valid JSON: nested too deeply"),
        ('{"transformer.lora_alpha": "x"}', "lora_alpha must be a finite number"),
        ('{"transformer.alpha_pattern": [1]}', "alpha_pattern must be an object"),
        ('{"transformer.alpha_pattern": {"(?:.|.)*!": 1}}', "alpha_pattern must have names"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, settings, message):
    path = tmp_path / "lora.safetensors"
    write_lora(path, {PROJ: FACTORS[PROJ]}, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=message):
        read_lora(path, CONFIG)


# -- writing ---------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    """Of every linear, those whose rows several of diffusers' weights have among them."""
    lora = load_lora(small_lora(tmp_path / "ours.safetensors", CONFIG), CONFIG, scale=-0.5)
    save_lora(tmp_path / "written.safetensors", lora, CONFIG)
    again = load_lora(tmp_path / "written.safetensors", CONFIG)
    assert again.layers.keys() == lora.layers.keys()
    for name, change in lora.layers.items():
        # Of the same rank: q, k and v share what they shared before.
        np.testing.assert_array_equal(again.layers[name].a, change.a)
        np.testing.assert_array_equal(again.layers[name].b, np.float32(-0.5) * change.b)
    names = load_file(tmp_path / "written.safetensors")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight" in names


def test_a_lora_that_cannot_be_written_is_refused(tmp_path):
    path = small_lora(tmp_path / "ours.safetensors", CONFIG)
    before, lora = path.read_bytes(), load_lora(path, CONFIG)
    with pytest.raises(UserError, match=r"exists: --force replaces it"):
        save_lora(path, lora, CONFIG)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"is written to a \.safetensors file"):
        save_lora(tmp_path / "lora.bin", lora, CONFIG)
    with pytest.raises(UserError, match="cannot|No such"):
        save_lora(tmp_path / "absent" / "lora.safetensors", lora, CONFIG)
    with pytest.raises(UserError, match="here it is of shape"):
        save_lora(tmp_path / "other.safetensors", lora, FluxConfig.tiny())
    save_lora(path, lora, CONFIG, force=True)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]
