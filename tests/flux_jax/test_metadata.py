"""Records inside PNG files: there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from flux_jax.errors import UserError
from flux_jax.metadata import GenerationRecord, read_picture, read_png, readable, save_png

RECORD = GenerationRecord(
    prompt="a red circle",
    seed=7,
    num_inference_steps=28,
    height=128,
    width=96,
    max_sequence_length=48,
    guidance_scale=3.5,
    negative_prompt="blurred",
    true_cfg_scale=2.0,
    batch_size=4,
    tiled=True,
    model="tiny",
    loras=("style.safetensors:0.8", "other.safetensors:-1"),
    kernels="jax",
    attention="xla_fp8",
    dtype="bfloat16",
    fingerprint="0123456789abcdef",
    version="0.1.0",
    platform="cpu",
)
IMAGE = Image.new("RGB", (4, 4), (255, 0, 0))


def with_chunk(path, text):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("flux_jax", text)
    IMAGE.save(path, pnginfo=chunks)
    return path


def test_round_trip(tmp_path):
    save_png(IMAGE, tmp_path / "image.png", RECORD)
    assert read_png(tmp_path / "image.png") == RECORD


@given(prompt=st.text(), negative=st.none() | st.text(), seed=st.none() | st.integers(0, 2**32))
def test_any_text_survives(tmp_path_factory, prompt, negative, seed):
    path = tmp_path_factory.mktemp("text") / "image.png"
    record = dataclasses.replace(RECORD, prompt=prompt, negative_prompt=negative, seed=seed)
    save_png(IMAGE, path, record)
    assert read_png(path) == record


def test_every_field_is_kept_and_used():
    """A field that neither draws the image again nor says what drew it would be clutter."""
    told = {"guidance_scale", "tiled", "model", "loras", "dtype", "fingerprint", "version"}
    told |= {"platform", "kernels", "attention"}
    fields = {field.name for field in dataclasses.fields(RECORD)}
    assert fields == set(RECORD.arguments()) | told
    assert "guidance_scale" not in dataclasses.replace(RECORD, guidance_scale=None).arguments()


def test_without_loras_tiles_and_kernels_earlier_versions_read_it(tmp_path):
    record = dataclasses.replace(RECORD, loras=(), tiled=None, kernels=None, attention=None)
    save_png(IMAGE, tmp_path / "image.png", record)
    with Image.open(tmp_path / "image.png") as image:
        assert not {"loras", "tiled", "kernels", "attention"} & set(
            json.loads(image.text["flux_jax"])
        )
    assert read_png(tmp_path / "image.png") == record


def test_readable_text():
    lines = readable(RECORD).splitlines()
    assert lines[:2] == ["a red circle", "Negative prompt: blurred"]
    assert "Steps: 28" in lines[2]
    assert "Seed: 7, Size: 96x128, Model: tiny, Model hash: 0123456789abcdef" in lines[2]
    plain = readable(dataclasses.replace(RECORD, negative_prompt=None, guidance_scale=None))
    assert "CFG" not in plain
    assert "LoRAs: style.safetensors:0.8 other.safetensors:-1" in lines[2]
    assert "LoRAs" not in readable(dataclasses.replace(RECORD, loras=()))


def test_other_programs_find_the_text(tmp_path):
    save_png(IMAGE, tmp_path / "image.png", RECORD)
    with Image.open(tmp_path / "image.png") as image:
        assert image.text["parameters"] == readable(RECORD)
        assert json.loads(image.text["flux_jax"])["prompt"] == "a red circle"


def test_a_record_is_optional(tmp_path):
    save_png(IMAGE, tmp_path / "image.png")
    with pytest.raises(UserError, match="carries no flux_jax metadata"):
        read_png(tmp_path / "image.png")


def test_an_image_without_a_seed_cannot_be_drawn_again():
    with pytest.raises(UserError, match="cannot be drawn again.* not from a seed"):
        dataclasses.replace(RECORD, seed=None).arguments()


def test_paths(tmp_path):
    with pytest.raises(UserError, match="image.jpg must end in .png"):
        save_png(IMAGE, tmp_path / "image.jpg", RECORD)
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        save_png(IMAGE, tmp_path / "absent" / "image.png", RECORD)
    with pytest.raises(UserError, match="absent.png does not exist"):
        read_png(tmp_path / "absent.png")


def test_the_image_comes_with_its_record(tmp_path):
    save_png(IMAGE, tmp_path / "image.png", RECORD)
    image, record = read_picture(tmp_path / "image.png")
    assert (image.tobytes(), record) == (IMAGE.tobytes(), RECORD)


def test_files_that_are_no_images(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(UserError, match="text.png cannot be read as an image"):
        read_png(text)
    save_png(IMAGE.resize((64, 64)), tmp_path / "whole.png", RECORD)
    whole = (tmp_path / "whole.png").read_bytes()
    cut = tmp_path / "cut.png"
    for length in range(10, len(whole) - 20, 97):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.png"):
            read_png(cut)


def test_an_image_that_is_too_large_to_be_decoded(tmp_path, monkeypatch):
    save_png(IMAGE.resize((64, 64)), tmp_path / "large.png", RECORD)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="large.png cannot be read as an image"):
        read_png(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "unknown format; this version reads format_version 1"),
        ({"scheduler": "heun"}, "unknown field 'scheduler'"),
        ({"seed": "7"}, r"whose seed should be int \| None, got '7'"),
        ({"height": True}, "whose height should be int, got True"),
        ({"prompt": None}, "whose prompt should be str, got None"),
        ({"tiled": 1}, r"whose tiled should be bool \| None, got 1"),
        ({"loras": "a:1"}, "whose loras should be tuple.*, got 'a:1'"),
        (
            {"guidance_scale": float("nan")},
            r"whose guidance_scale should be float \| None, got nan",
        ),
        ({"loras": [1]}, r"whose loras should be tuple.*, got \[1\]"),
    ],
)
def test_metadata_of_another_kind(tmp_path, change, message):
    content = {"format_version": 1, **dataclasses.asdict(RECORD), **change}
    with pytest.raises(UserError, match=message):
        read_png(with_chunk(tmp_path / "image.png", json.dumps(content)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged flux_jax metadata"),
        ("[1]", "unknown format"),
        ('{"seed": ' + "1" * 5000 + "}", "damaged flux_jax metadata"),
        ('{"seed": ' + "[" * 100_000, "damaged flux_jax metadata: .*nested too deeply"),
        ('{"format_version": 1, "prompt": "a"}', "incomplete flux_jax metadata.*'seed'"),
    ],
)
def test_damaged_metadata(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_png(with_chunk(tmp_path / "image.png", text))
