import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from benchmarks import step_worker, transformer_step
from benchmarks.common import read_result
from flux_jax.errors import UserError
from tests.jobs import with_devices

# The processes that the benchmark starts must not see eight fake devices.
ENVIRONMENT = {"XLA_FLAGS": with_devices(1)["XLA_FLAGS"], "JAX_PLATFORMS": "cpu"}


@pytest.mark.long
def test_tiny_run_writes_a_result(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "benchmarks.transformer_step", "--tiny", "--repeats", "2"]
    subprocess.run([*command, "--out", str(tmp_path), "--profile", str(tmp_path / "p")], check=True)
    (path,) = tmp_path.glob("*.json")
    result = read_result(path)
    figures = result.figures
    assert result.benchmark == "transformer_step_tiny"
    assert figures["step_ms"].value > 0
    assert figures["compile_warm_s"].value < figures["compile_cold_s"].value
    parts = ("floor_linears_ms", "floor_attention_ms", "floor_modulation_ms")
    assert sum(figures[name].value for name in parts) == pytest.approx(
        figures["floor_ms"].value, rel=1e-4
    )
    assert "matmul" in (tmp_path / "p" / "table.txt").read_text()


def test_variants_compute_the_same():
    config, step = step_worker.SIZES["tiny"]
    # Two of each kind of block, in turn, are as good as all of them.
    config = dataclasses.replace(config, depth=2, depth_single_blocks=2)
    graphdef, state = step_worker.random_weights(config)
    sets = step_worker.random_inputs(config, step)
    outputs = {}
    for name, prepare in step_worker.VARIANTS.items():
        run, arguments, _ = prepare(graphdef, state, sets)
        step_worker.check_outputs(run, arguments)
        outputs[name] = np.asarray(run(*arguments[1]), np.float32)
    whole = outputs.pop("whole")
    for name, output in outputs.items():
        # bf16: programs cut at other places round at other places.
        error = np.linalg.norm(output - whole) / np.linalg.norm(whole)
        assert error < 2e-2, name


@pytest.mark.parametrize("bits", [8, 16])
def test_the_ternary_step_runs_and_keeps_the_variance(bits):
    config, step = step_worker.SIZES["tiny"]
    config = dataclasses.replace(config, depth=1, depth_single_blocks=1)
    graphdef, state = step_worker.random_weights(config, f"ternary-a{bits}", "jax")
    layer = nnx.merge(graphdef, state).single_blocks[0].linear2
    assert layer.backend == "jax"
    assert layer.activation_bits == bits
    weight = np.asarray(layer.dense_weight())
    assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    sets = step_worker.random_inputs(config, step)
    run, arguments, text = step_worker.prepare_hoisted(graphdef, state, sets)
    step_worker.check_outputs(run, arguments)
    assert ("s8[1,112,256]" in text or "s8[112,256]" in text) == (bits == 8)


def test_weights_hold_no_zeros_and_are_scaled_by_their_inputs():
    import jax

    _, state = step_worker.random_weights(step_worker.SIZES["tiny"][0])
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        values = np.asarray(leaf, np.float32)
        assert (values != 0).mean() > 0.99, path
        if values.ndim == 2:
            assert values.std() == pytest.approx(values.shape[1] ** -0.5, rel=0.05), path


def test_check_outputs_refuses_what_cannot_be_timed():
    ones = np.ones(3)
    with pytest.raises(RuntimeError, match="not finite"):
        step_worker.check_outputs(lambda x: x * np.nan, [(ones,), (ones,)])
    with pytest.raises(RuntimeError, match="does not depend on its input"):
        step_worker.check_outputs(lambda x: ones, [(ones,), (2 * ones,)])


def test_a_failed_part_is_reported(capsys):
    def fails():
        raise RuntimeError("no such thing")

    assert transformer_step.part("a part", fails) is None
    found = capsys.readouterr()
    assert (found.out, found.err) == ("a part\n", "  no such thing\n")


def test_an_unknown_variant_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="expected some of whole, hoisted, .*, got half, none"):
        transformer_step.main(variants="whole,none,half")


@pytest.mark.long
@pytest.mark.parity
def test_peer_writes_its_figures(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[parity]'")
    output = tmp_path / "peer.json"
    command = [sys.executable, "-m", "benchmarks.peers.diffusers_step", "--size", "tiny"]
    arguments = ["--no-compiled", "--repeats", "1", "--output", str(output)]
    subprocess.run([*command, *arguments], check=True)
    peers = transformer_step.peer_results(json.loads(output.read_text()))
    assert peers["diffusers, eager"].figures["step_ms"].value > 0
