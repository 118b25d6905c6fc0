"""The comparison of a LoRA's effect on teacher and student, with one step a picture."""

from __future__ import annotations

import pytest
from PIL import Image

from benchmarks import lora_adaptation
from benchmarks.common import read_result
from flux_jax.configs import FluxConfig
from tests.lora_files import small_lora


@pytest.mark.slow
def test_rows_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_adaptation, "SHOWN", 3)
    config = FluxConfig.tiny()
    paths = [
        small_lora(tmp_path / f"{seed}.safetensors", config, strength=0.15, seed=seed)
        for seed in range(2)
    ]
    lora_adaptation.main(
        lora=paths[0],
        adapted=paths[1],
        limit=1,
        steps=1,
        image=tmp_path / "rows.png",
        out=tmp_path / "results",
    )
    (path,) = (tmp_path / "results").iterdir()
    figures = read_result(path).figures
    rows = dict.fromkeys(name.rpartition("/")[0] for name in figures)
    # Without a LoRA of its own there is no row for it.
    assert len(rows) == 5
    assert "teacher, the LoRA/psnr" not in figures
    assert figures["student, without/psnr"].note == "median of 6 pictures"
    assert all(0 < figures[f"{row}/light"].value < 1 for row in rows)
    assert (
        figures["student, the teacher's LoRA/psnr"].value
        != figures["student, the LoRA adapted/psnr"].value
    )
    with Image.open(tmp_path / "rows.png") as image:
        assert image.size == (3 * 128, 5 * 128)
