"""The 1.58-bit model that ships with the package, against its teacher."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.student import eight_bit
from flux_jax.assets import STUDENT, TEACHER, shipped_path
from flux_jax.composition.prompts import load_prompts
from flux_jax.images import psnr
from flux_jax.pipeline import FluxPipeline
from ternary.config import QuantConfig
from ternary.distillation.held_out import HeldOut
from ternary.policy import Policy
from ternary.storage.checkpoint import open_checkpoint
from ternary.storage.inspection import inspect_checkpoint
from ternary.student import freeze_student, make_student


def test_how_much_is_ternary_and_how_small_it_is():
    report = inspect_checkpoint(shipped_path(STUDENT))
    assert report.ternary_fraction >= 0.97
    with open_checkpoint(shipped_path(STUDENT)) as student:
        layers = set(student.layers)
        total = sum(int(np.prod(shape)) for shape in student.shapes.values())
        blocks = {
            name.removesuffix(".weight")
            for name, shape in student.shapes.items()
            if "_blocks." in name and len(shape) == 2
        }
    assert blocks <= layers
    files = (shipped_path(STUDENT) / "transformer").iterdir()
    assert 8 * sum(file.stat().st_size for file in files) / total <= 2.0


def test_everything_else_is_the_teachers():
    for path in sorted(shipped_path(TEACHER).rglob("*.safetensors")):
        inside = path.relative_to(shipped_path(TEACHER))
        if inside.parts[0] != "transformer":
            assert (shipped_path(STUDENT) / inside).read_bytes() == path.read_bytes(), inside


@pytest.mark.long
def test_it_draws_nearly_what_its_teacher_draws():
    """On a few held-out prompts; `benchmarks.student` draws them all."""
    prompts = [prompt.prompt for prompt in load_prompts()[::48]]
    teacher = FluxPipeline.from_pretrained(TEACHER)
    student = FluxPipeline.from_pretrained(STUDENT).transformer
    with open_checkpoint(shipped_path(STUDENT)) as checkpoint:
        policy = Policy(include=tuple(checkpoint.layers))
    held_out = HeldOut(teacher, teacher.encode_prompt(prompts), batch_size=len(prompts))
    trained = held_out.compare(student)
    assert trained.median_psnr >= 22.0
    rounded = freeze_student(make_student(teacher.transformer, QuantConfig(), policy))
    assert held_out.compare(rounded).median_psnr < trained.median_psnr - 10.0
    eight = held_out.compare(eight_bit(student))
    assert eight.median_psnr >= 22.0
    # Eight bits do change something, and little.
    assert 25.0 < np.median(psnr(eight.images, trained.images)) < 99.0
