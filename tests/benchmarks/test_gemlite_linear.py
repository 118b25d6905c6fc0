"""The peer of the ternary kernels, without gemlite and without a GPU."""

import subprocess
import sys
import time

import pytest

from benchmarks.peers import gemlite_linear
from benchmarks.peers.gemlite_linear import GRAPH, Timing
from flux_jax.errors import UserError
from pallas_kernels import shapes


def cpu_timed(calls, repeats):
    start = time.perf_counter()
    outputs = calls()
    return 1e3 * (time.perf_counter() - start), "queued calls", outputs


def measure(build, shape=(16, 64, 96)):
    return gemlite_linear.measure(shape, "a8", device="cpu", build=build, timed=cpu_timed)


def test_shapes_are_tokens_inputs_outputs():
    text = "4608x3072x9216, 1x32x64"
    assert gemlite_linear.parse_shapes(text) == ((4608, 3072, 9216), (1, 32, 64))


@pytest.mark.parametrize("text", ["", "1x2", "1x2x0", "axbxc", "1x2x3x4"])
def test_other_shapes_are_refused(text):
    with pytest.raises(UserError, match="--shapes: expected TOKENSxINPUTSxOUTPUTS, got"):
        gemlite_linear.parse_shapes(text)


def test_what_fails_or_is_late_is_told_and_left_out(capsys, monkeypatch):
    monkeypatch.setattr(gemlite_linear, "LIMIT_S", 0.2)

    def one(shape, what):
        if shape[0] == 1 and what == "a16":
            raise RuntimeError("wrong: off by 99%\nmore")
        if shape[0] == 2:
            time.sleep(5)
        return Timing(shape=shape, what=what, ms=1.0, error=0.01, how=GRAPH)

    shapes = [(1, 32, 8), (2, 32, 8)]
    found, left_out = gemlite_linear.measure_all(shapes, ("a16", "a8"), 60, one)
    assert [(timing.shape, timing.what) for timing in found] == [((1, 32, 8), "a8")]
    assert left_out == [
        "a16 1x32x8: RuntimeError: wrong: off by 99%",
        "a16 2x32x8: TimeoutError: took longer than 0 s",
        "a8 2x32x8: TimeoutError: took longer than 0 s",
    ]
    assert "a8 1x32x8: 1.0000 ms, off by 1.00%, CUDA graph" in capsys.readouterr().out


def test_what_the_budget_does_not_cover_is_left_out():
    def one(shape, what):
        raise AssertionError("not to be run")

    found, left_out = gemlite_linear.measure_all([(1, 32, 8)], ("a8",), 0, one)
    assert found == []
    assert left_out == ["a8 1x32x8: TimeoutError: the 0 s for all are over"]


def test_what_cannot_be_compiled_is_told(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gemlite_linear.compile_all([(1, 32, 8)], "fast", 2)
    told = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0].strip() for line in told] == [
        "compiling a16 1x32x8",
        "compiling a8 1x32x8",
    ]


@pytest.mark.parity
def test_a_right_product_is_timed_with_every_set():
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    built = []

    def build(what, signs, bias):
        built.append(what)
        weight = gemlite_linear.SCALE * signs
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    found = measure(build)
    assert built == ["a8"] * shapes.ENOUGH_SETS
    assert found.ms > 0
    assert 0 < found.error < 0.01


@pytest.mark.parity
@pytest.mark.parametrize("wrong", ["no bias", "other codes", "nan"])
def test_a_wrong_product_is_no_peer(wrong):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")

    def build(what, signs, bias):
        weight = gemlite_linear.SCALE * (signs.roll(1, 0) if wrong == "other codes" else signs)
        bias = {"no bias": None, "nan": bias * torch.nan}.get(wrong, bias)
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    with pytest.raises(RuntimeError, match=r"wrong: off by .*% of the output, expected 5%"):
        measure(build)


def test_without_a_gpu_or_gemlite_it_says_what_it_needs(tmp_path):
    output = tmp_path / "peer.json"
    command = [sys.executable, "-m", "benchmarks.peers.gemlite_linear", "--tiny"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "error: needs" in done.stderr
    assert not output.exists()
