"""The benchmark of LoRAs at tiny size."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks import lora
from benchmarks.common import read_result
from flux_jax.configs import FluxConfig


def test_a_lora_changes_what_most_trainers_change():
    found = lora.random_lora(FluxConfig.tiny(), 4)
    # Of three double blocks eight linears each, of six single ones two.
    assert len(found.layers) == 3 * 8 + 6 * 2
    assert {change.a.shape[0] for change in found.layers.values()} == {4}


@pytest.mark.long
def test_rows(tmp_path):
    result = CliRunner().invoke(lora.app, ["--tiny", "--out", str(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    (path,) = tmp_path.iterdir()
    figures = read_result(path).figures
    for bits, ranks in lora.ROWS:
        weights = "bf16" if bits is None else f"W1.58A{bits}"
        rows = [weights if not rank else f"{weights}, a LoRA of rank {rank}" for rank in ranks]
        sizes = [figures[f"{row}/weights"].value for row in rows]
        assert sizes == sorted(set(sizes))
        times = figures[f"{rows[1]}/step"].value / figures[f"{weights}/step"].value
        assert figures[f"{rows[1]}/times"].value == pytest.approx(times, rel=1e-4)
