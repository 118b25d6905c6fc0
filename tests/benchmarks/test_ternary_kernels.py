"""The committed benchmark of the kernels: what becomes of measured rows."""

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
    figures = ternary_kernels.speedups([*rows(), *rows(k=12288, faster=0.5), *rows(m=1)])
    assert figures["a8_speedup"].value == pytest.approx(1.0)
    assert figures["few_a8_speedup"].value == pytest.approx(2.0)
    assert figures["a8_product_speedup"].value == pytest.approx(1.0)
    assert figures["triton_a8_speedup"].value == pytest.approx(1.0)
    assert "the limit is 2.0" in figures["a8_speedup"].note
    assert "a16_speedup" not in figures


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
    assert "| W1.58A8, quantising its activations, over bf16, Mosaic | 2.00 x |" in text
    assert "| W1.58A8, quantising its activations, over bf16, Triton | 1.00 x |" in text
    assert "| W1.58A8, from quantised activations, over int8, Mosaic | 1.00 x |" in text


def test_without_a_gpu_it_says_what_it_needs():
    with pytest.raises(UserError, match="needs an NVIDIA GPU from Ampere on; --tiny runs anywh"):
        ternary_kernels.main()
