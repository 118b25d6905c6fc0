"""The model that ships with the package: its folder, and that it draws what it is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from flux_jax.assets import TEACHER, shipped_path
from flux_jax.checkpoint import load_checkpoint
from flux_jax.cli import app
from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.detector import detect
from flux_jax.composition.prompts import load_prompts
from flux_jax.composition.score import judge

FILES = sorted(path for path in shipped_path(TEACHER).rglob("*") if path.is_file())


def test_size_of_the_folder():
    sizes = {path.name: path.stat().st_size for path in FILES}
    assert sum(path.stat().st_size for path in FILES) <= 36e6
    assert max(sizes.values()) < 16e6, sizes
    weights = [path for path in FILES if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "vae",
    }
    # Everything else is text.
    assert {path.suffix for path in FILES} <= {".safetensors", ".json", ".txt"}


def test_one_component_may_stand_for_itself():
    found = load_checkpoint(TEACHER, components="text_encoder")
    assert set(found.modules) == {"text_encoder"}


def test_info_of_the_folder():
    result = CliRunner().invoke(app, ["info", "tiny", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["layout"] == "diffusers"
    assert {tuple(part["dtypes"]) for part in report["components"].values()} == {("bfloat16",)}
    assert report["components"]["vae"]["config"]["sample_size"] >= 128
    assert report["components"]["transformer"]["config"]["guidance_embed"] is True


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_no_evaluation_prompt_is_cut_or_unknown(name):
    tokenizer = AutoTokenizer.from_pretrained(str(shipped_path(TEACHER) / name))
    encoded = tokenizer([prompt.prompt for prompt in load_prompts()])["input_ids"]
    assert max(map(len, encoded)) <= tokenizer.model_max_length
    unknown = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert unknown.isdisjoint(token for ids in encoded for token in ids)


def draw(out: Path, *arguments: str) -> np.ndarray:
    result = CliRunner().invoke(app, ["generate", *arguments, "--out", str(out)])
    assert result.exit_code == 0, (result.output, result.exception)
    with Image.open(out) as image:
        return np.asarray(image)


@pytest.mark.slow
def test_the_first_image_shows_what_its_prompt_says(tmp_path):
    """As `make demo` draws it: every default, on the CPU, in bf16. Replayed, it is the same."""
    picture = draw(tmp_path / "image.png", "a red circle above a blue square", "--seed", "0")
    assert picture.shape == (128, 128, 3)
    claim = Claim(
        groups=(Group(shape="circle", color="red"), Group(shape="square", color="blue")),
        relation="above",
    )
    verdict = judge(detect(picture), claim, counting=False)
    assert verdict.exact, verdict.reasons
    # The detector is not content with just anything.
    assert not judge(
        detect(picture), Claim(groups=claim.groups[::-1], relation="above"), counting=False
    ).passed
    again = draw(tmp_path / "again.png", "--replay", str(tmp_path / "image.png"))
    np.testing.assert_array_equal(again, picture)
