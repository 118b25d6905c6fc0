"""The full-size benchmark, on the tiny model."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from benchmarks import processes, ternary_fullsize
from benchmarks.common import read_result
from benchmarks.machine import GIB
from benchmarks.processes import CARD_BYTES, memory_settings
from benchmarks.scaled_weights import ScaledTensors, write_pipeline
from benchmarks.ternary_fullsize import result_figures
from benchmarks.ternary_fullsize_worker import SIZES
from convert.tensors import read_whole, total_bytes
from flux_jax.checkpoint import inspect_checkpoint
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from tests.jobs import with_devices


@pytest.mark.long
def test_tiny_run_writes_a_result(tmp_path, monkeypatch):
    # The processes that it starts must not see eight fake devices.
    monkeypatch.setenv("XLA_FLAGS", with_devices(1)["XLA_FLAGS"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    command = [sys.executable, "-m", "benchmarks.ternary_fullsize", "--tiny"]
    work = tmp_path / "work"
    subprocess.run([*command, "--work", str(work), "--out", str(tmp_path)], check=True)
    (path,) = tmp_path.glob("*.json")
    result = read_result(path)
    assert result.benchmark == "ternary_fullsize_tiny"
    figures = {name: figure.value for name, figure in result.figures.items()}
    # Most of the tiny model's bytes are not in its two blocks.
    assert 3 < figures["ratio"] < 5
    assert figures["calibrated_gb"] == pytest.approx(figures["stored_gb"], rel=0.01)
    assert figures["ternary_share"] > 0.8
    for kind in ("double", "single"):
        assert 0 < figures[f"{kind}_loss_after"] < figures[f"{kind}_loss_before"]
    assert figures["first_step_s"] > figures["step_ms"] / 1e3 > 0
    for stage in ("quantize", "calibrate", "load", "step"):
        assert figures[f"{stage}_host_gb"] > 0.05
    assert not list(work.iterdir())


def test_two_sizes_at_a_time_are_refused(tmp_path):
    with pytest.raises(UserError, match="--tiny runs anywhere; leave out --cpu"):
        ternary_fullsize.main(tiny=True, cpu=True, work=tmp_path)


def test_full_size_is_flux_devs():
    size = SIZES["full"]
    assert size.config == FluxConfig.dev()
    assert (size.grid, size.text_tokens) == ((64, 64), 512)
    assert [name.partition("_")[0] for name in size.blocks] == ["double", "single"]


def test_on_a_cpu_nothing_is_calibrated():
    assert (SIZES["cpu"].config, SIZES["cpu"].blocks) == (FluxConfig.dev(), ())
    found = {
        "source": {"source_bytes": 24e9},
        "quantize": {"process_s": 12.0, "host_bytes": 1e9, "stored_bytes": 2.5e9},
        "load": {
            "seconds": 3.0,
            "host_bytes": 4e9,
            "device_bytes": None,
            "ternary_fraction": 0.99,
        },
        "step": {"first_s": 9.0, "step_s": 8.0, "host_bytes": 5e9},
    }
    figures = {n: f.value for n, f in result_figures(found).items()}
    assert figures["ratio"] == pytest.approx(9.6)
    assert figures["quantize_gb_per_s"] == pytest.approx(2.0)
    assert (figures["step_ms"], figures["step_host_gb"]) == (8000.0, 5.0)
    assert not [name for name in figures if name.startswith("calibrate")]


def test_the_pool_is_that_of_a_24_gb_card():
    total = 143771 * 2**20
    settings = memory_settings(total)
    fraction = float(settings["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    assert 0.99 * CARD_BYTES < fraction * total <= CARD_BYTES < 24e9
    assert settings["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    with pytest.raises(RuntimeError, match="the device has 16.0 GiB, a 24 GB card has more"):
        memory_settings(16 * GIB)


def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert processes.card_environment() == {}


def test_a_failed_process_is_reported():
    with pytest.raises(RuntimeError, match="failed: exit code 3"):
        processes.run_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_weights_are_scaled_by_their_inputs(tmp_path):
    config = SIZES["tiny"].config
    nbytes = write_pipeline(tmp_path / "m", config)
    reader = ScaledTensors(config)
    assert total_bytes(reader) == nbytes
    found = inspect_checkpoint(tmp_path / "m")
    assert list(found.components) == ["transformer"]
    assert found.components["transformer"].config == config
    for name, spec in reader.specs.items():
        values = read_whole(reader, name)
        assert values.dtype == ml_dtypes.bfloat16
        values = values.astype(np.float32)
        assert (values != 0).mean() > 0.99, name
        if len(spec.shape) == 2:
            assert values.std() == pytest.approx(spec.shape[1] ** -0.5, rel=0.1), name
            assert len(np.unique(values, axis=0)) == len(values), name
        else:
            expected = 1.0 if name.endswith(".weight") else 0.0
            assert values.mean() == pytest.approx(expected, abs=0.1), name
    # Blocks of rows are the rows of the whole.
    name = "transformer_blocks.0.attn.to_q.weight"
    rows = np.empty((3, reader.specs[name].shape[1]), ml_dtypes.bfloat16)
    reader.read_into(name, 5, rows)
    np.testing.assert_array_equal(rows, read_whole(reader, name)[5:8])
