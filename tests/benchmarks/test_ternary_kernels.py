"""The committed benchmark of the kernels: what becomes of measured rows."""

import sys

import pytest

from benchmarks import render_tables, ternary_kernels
from benchmarks.common import read_result
from flux_jax.errors import UserError
from pallas_kernels import bench
from pallas_kernels.bench import Row


def rows(m=4608, k=3072, faster=2.0):
    def row(what, backend, ms):
        return Row(m=m, k=k, n=8, what=what, backend=backend, ms=ms, tops=3.0)

    return [
        row(bench.BF16_DOT, "xla", 1.0),
        row(bench.INT8_DOT, "xla", 0.5),
        row(bench.A8, "mosaic", 1 / faster),
        row(bench.A8_PRODUCT, "mosaic", 0.5),
        row(bench.A8, "triton", 1.0),
    ]


def test_speedups_are_geometric_means_over_the_shapes():
    found = [*rows(), *rows(k=12288, faster=0.5), *rows(m=1)]
    figures = ternary_kernels.speedups(found, {})
    assert figures["a8_speedup"].value == pytest.approx(1.0)
    assert figures["few_a8_speedup"].value == pytest.approx(2.0)
    assert figures["a8_product_speedup"].value == pytest.approx(1.0)
    assert figures["triton_a8_speedup"].value == pytest.approx(1.0)
    assert "the limit is 2.0" in figures["a8_speedup"].note
    assert "a16_speedup" not in figures


def test_bf16_is_the_faster_of_two_libraries():
    figures = ternary_kernels.speedups(rows(), {(4608, 3072, 8): 0.8})
    assert figures["a8_speedup"].value == pytest.approx(1.6)
    assert figures["a8_product_speedup"].value == pytest.approx(1.0)
    assert "torch's bf16 linear" in figures["a8_speedup"].note
    assert ternary_kernels.speedups(rows(), {(4608, 3072, 8): 2.0})["a8_speedup"].value == 2.0
    # Of all shapes or of none.
    found = ternary_kernels.speedups([*rows(), *rows(m=1)], {(4608, 3072, 8): 0.8})
    assert found["a8_speedup"].value == 2.0
    assert "torch" not in found["a8_speedup"].note
    assert ternary_kernels.torch_bf16(MEASURED) == {(1, 3072, 8): 1.0}
    assert ternary_kernels.torch_bf16(None) == {}


def test_a_branch_costs_its_time_over_the_one_without():
    def row(what, k, ms):
        return Row(m=4608, k=k, n=8, what=what, backend="triton", ms=ms, tops=1.0)

    found = [row(bench.A8_PRODUCT, k, 1.0) for k in (1, 2)]
    found += [row(bench.A8_RANK, 1, 1.1), row(bench.A8_RANK, 2, 1.2)]
    figures = ternary_kernels.branches(found)
    assert set(figures) == {"triton_a8_product_branch"}
    assert figures["triton_a8_product_branch"].value == pytest.approx((1.1 * 1.2) ** 0.5)


def test_the_result_can_be_read_back(tmp_path):
    result = ternary_kernels.to_result("ternary_kernels", rows(), "NVIDIA H200", "unknown")
    read = read_result(result.write(tmp_path))
    assert read.figures["a8_ms/4608x3072x8"].value == 0.5
    assert read.figures["triton_a8_ms/4608x3072x8"].note == "3 TOP/s"
    assert read.peers["XLA, dense"].figures["bf16_dot_ms/4608x3072x8"].value == 1.0
    assert "a8_ms/4608x3072x8" not in read.peers["XLA, dense"].figures


def test_the_table_has_the_speedups():
    result = ternary_kernels.to_result("ternary_kernels", rows(), "NVIDIA H200", "unknown")
    text = render_tables.render_result(result)
    with_quantising, alone = text.splitlines()[2:4]
    assert with_quantising.startswith("| W1.58A8 with quantising, over bf16, 4608 tokens |")
    assert with_quantising.endswith("| 2.0 x | 1.75 x | 2.00 x | 1.00 x |")
    assert alone.startswith("| W1.58A8 alone, over XLA's int8, 4608 tokens |")
    assert alone.endswith("| 1.05 x | 1.0 x | 1.00 x |  |")


MEASURED = {
    "versions": {"python": "3.12.3", "gemlite": "0.6.0.post2"},
    "autotune": "fast",
    "timings": [
        {"shape": shape, "what": what, "ms": ms, "error": 0.0123, "how": "CUDA graph"}
        for shape, what, ms in (
            ([4608, 3072, 8], "a8", 1.5),
            ([4608, 3072, 8], "a16", 9.0),
            ([1, 3072, 8], "a16", 0.25),
            ([4608, 12288, 8], "a8", 12.0),
            ([4608, 12288, 8], "a16", 13.0),
            # A shape with one mode alone is compared with none.
            ([16, 3072, 8], "a8", 0.01),
            ([1, 3072, 8], "a8", 2.0),
            ([1, 3072, 8], "bf16_linear", 1.0),
        )
    ],
}


def test_gemlite_over_ours_is_a_geometric_mean_and_the_worst():
    found = [*rows(), *rows(k=12288), *rows(m=16), *rows(m=1)]
    figures = ternary_kernels.over_gemlite(found, MEASURED)
    values = {name: figure.value for name, figure in figures.items()}
    assert values == pytest.approx(
        {
            "over_gemlite_a8": (3.0 * 24.0) ** 0.5,
            "few_over_gemlite_a8": 0.5,
            "over_gemlite_a8_worst": 0.5,
            "triton_over_gemlite_a8": (1.5 * 12.0) ** 0.5,
            "triton_few_over_gemlite_a8": 0.25,
            "triton_over_gemlite_a8_worst": 0.25,
        }
    )
    over = "over the faster of gemlite's A16W158 and A8W158, autotuned: fast"
    assert figures["over_gemlite_a8"].note == f"{over}; 2 shapes"
    assert figures["over_gemlite_a8_worst"].note.endswith("fast; 1x3072x8")


def test_gemlite_is_a_peer_with_its_own_times(tmp_path):
    result = ternary_kernels.to_result("ternary_kernels", rows(), "NVIDIA H200", "no", MEASURED)
    read = read_result(result.write(tmp_path))
    peer = read.peers["gemlite"]
    assert peer.versions == MEASURED["versions"]
    assert peer.figures["a8_ms/4608x3072x8"].value == 1.5
    assert peer.figures["a8_ms/4608x3072x8"].note == "CUDA graph, off by 1.2%, autotuned: fast"
    assert peer.figures["bf16_linear_ms/1x3072x8"].note == "CUDA graph, off by 1.2%"
    text = render_tables.render_result(read)
    assert (
        "| W1.58A8, over gemlite's faster mode, 4608 tokens |  | ahead | 3.00 x | 1.50 x |" in text
    )
    worst = "| W1.58A8, over gemlite's faster mode, the worst shape |  | ahead | 3.00 x | 1.50 x |"
    assert worst in text
    assert "gemlite 0.6.0.post2" in text


def test_without_gemlite_it_is_told_and_left_out(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemlite", None)
    assert ternary_kernels.time_gemlite([(1, 32, 8)], 1) is None
    assert "gemlite is left out: it is not installed" in capsys.readouterr().err


def test_a_failing_gemlite_is_told_and_left_out(capsys, monkeypatch):
    calls = []

    def run_module(*command):
        calls.append(command)
        raise RuntimeError("-m benchmarks.peers.gemlite_linear failed: exit code 1")

    monkeypatch.setattr(ternary_kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ternary_kernels, "run_module", run_module)
    assert ternary_kernels.time_gemlite([(1, 32, 8), (16, 64, 8)], 3) is None
    assert "left out: -m benchmarks.peers.gemlite_linear failed" in capsys.readouterr().err
    module, *options = calls[0]
    assert module == "benchmarks.peers.gemlite_linear"
    assert options == ["--shapes", "1x32x8,16x64x8", "--repeats", "3"]


def test_without_a_gpu_it_says_what_it_needs():
    with pytest.raises(UserError, match="needs an NVIDIA GPU from Ampere on; --tiny runs anywh"):
        ternary_kernels.main()
