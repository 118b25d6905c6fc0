"""What is made of measured times."""

import dataclasses

from pallas_kernels import bench
from pallas_kernels.bench import Row


def row(what, backend, ms):
    return Row(m=1, k=2, n=3, what=what, backend=backend, ms=ms, tops=1.0)


def test_ratios():
    rows = [
        row(bench.BF16_DOT, "xla", 4.0),
        row(bench.INT8_DOT, "xla", 2.0),
        row(bench.A8, "mosaic", 2.0),
        row(bench.A8_PRODUCT, "mosaic", 1.0),
    ]
    assert bench.ratio_to_dense(rows, bench.A8, "mosaic") == {(1, 2, 3): 2.0}
    assert bench.ratio_to_dense(rows, bench.A8_PRODUCT, "mosaic") == {(1, 2, 3): 2.0}
    assert bench.ratio_to_dense(rows, bench.A8, "triton") == {}
    assert [line.rstrip().endswith("2.00x") for line in bench.table(rows)[1:]] == [
        False,
        False,
        True,
        True,
    ]


def test_few_rows_are_compared_by_the_time_on_the_device():
    def timed(what, ms, device_ms):
        return Row(m=1, k=2, n=3, what=what, backend="xla", ms=ms, tops=1.0, device_ms=device_ms)

    rows = [timed("bf16 dot", 9.0, 4.0), dataclasses.replace(timed("A16", 9.0, 2.0), backend="jax")]
    assert bench.ratio_to_dense(rows, "A16", "jax") == {(1, 2, 3): 2.0}
    assert bench.ratio_to_dense([rows[0]], "A16", "jax") == {}
