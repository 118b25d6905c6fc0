"""Times packed-ternary products on this GPU, and XLA's dense products beside them.

    python -m benchmarks.ternary_kernels

The shapes are the products of one FLUX.1-dev step at 1024 x 1024 (4608 tokens), and its modulation
at 1 and 16 rows. Medians over programs that call a product once for each of several sets of inputs,
more than the cache holds; see `pallas_kernels.bench` for what is in each time.

- a16, a8: the op from bfloat16 to bfloat16, with scale and bias; a8 quantises its activations.
- a8_product: from activations that are quantised already.
- *_speedup: geometric mean over the shapes, of XLA's dense time over ours: the bf16 dot, or for
  a8_product the int8 dot, whose int32 result XLA leaves unscaled.

Writes `benchmarks/results/ternary_kernels_<gpu>.json`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Annotated

import typer

from benchmarks.common import RESULTS, Commit, Figure, OutOrNone, Peer, Result, Tiny, run
from benchmarks.machine import device_figures, git_commit, package_versions
from flux_jax.errors import UserError
from pallas_kernels import bench
from pallas_kernels.bench import Row

NAMES = {
    bench.BF16_DOT: "bf16_dot",
    bench.INT8_DOT: "int8_dot",
    bench.A16: "a16",
    bench.A8: "a8",
    bench.A8_PRODUCT: "a8_product",
    bench.QUANTIZE: "quantize",
    bench.NORMALIZE: "normalize_quantize",
}
# The rate of int8 over bf16 on the tensor cores; and a quarter of the bytes of int8's weights.
LIMITS = {bench.A16: 1.05, bench.A8: 2.0, bench.A8_PRODUCT: 1.05}
FEW_ROWS, FEW_LIMIT = 16, 8.0


def shape_name(row: Row) -> str:
    """`4608x3072x9216`: tokens, inputs, outputs."""
    return f"{row.m}x{row.k}x{row.n}"


def times(rows: Iterable[Row]) -> dict[str, Figure]:
    """One figure for each row; other backends than Mosaic have their name in it."""
    figures = {}
    for row in rows:
        backend = "" if row.backend in ("xla", "mosaic") else f"{row.backend}_"
        note = f"{row.tops:.0f} TOP/s" if row.tops else ""
        name = f"{backend}{NAMES[row.what]}_ms/{shape_name(row)}"
        figures[name] = Figure(value=row.ms, unit="ms", note=note)
    return figures


def speedups(rows: list[Row]) -> dict[str, Figure]:
    """Geometric means over the shapes of many rows, and over those of few."""
    figures = {}
    for backend in dict.fromkeys(row.backend for row in rows if row.backend != "xla"):
        prefix = "" if backend == "mosaic" else f"{backend}_"
        for what, limit in LIMITS.items():
            ratios = bench.ratio_to_dense(rows, what, backend)
            for few in (False, True):
                chosen = [v for (m, _, _), v in ratios.items() if (m <= FEW_ROWS) == few]
                # An int8 dot of a few rows is bound by its weights, as everything there is.
                if chosen and not (few and what == bench.A8_PRODUCT):
                    name = f"{prefix}{'few_' * few}{NAMES[what]}_speedup"
                    mean = statistics.geometric_mean(chosen)
                    over = "XLA's int8 dot" if what == bench.A8_PRODUCT else "XLA's bf16 dot"
                    note = f"over {over}; the limit is {FEW_LIMIT if few else limit}"
                    figures[name] = Figure(value=mean, unit="x", note=note)
    return figures


def to_result(benchmark: str, rows: list[Row], device: str, commit: str) -> Result:
    """The result file: ours, and XLA's dense products as the peer."""
    dense = [row for row in rows if row.backend == "xla"]
    ours = [row for row in rows if row.backend != "xla"]
    return Result(
        benchmark=benchmark,
        device=device,
        commit=commit,
        figures={**speedups(rows), **times(ours)},
        peers={"XLA, dense": Peer(versions=package_versions("jax"), figures=times(dense))},
        versions=package_versions("jax", "jaxlib", "jax-triton", "triton"),
    )


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timings that each median is over.")] = 15,
    tiny: Tiny = False,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Time packed-ternary products and XLA's dense ones."""
    names = tuple(name for name, reason in bench.backends_here().items() if reason is None)
    kernels = tuple(name for name in names if name != "jax")
    if not tiny and not kernels:
        raise UserError("needs an NVIDIA GPU from Ampere on; --tiny runs anywhere")
    rows = []
    for m, k, n in bench.SMALL if tiny else (*bench.MANY, *bench.FEW):
        for row in bench.time_shape(m, k, n, backends=kernels or names, repeats=repeats):
            rows.append(row)
            typer.echo(f"{shape_name(row):>18} {row.what:20} {row.backend:7} {row.ms:9.4f} ms")
    name = "ternary_kernels_tiny" if tiny else "ternary_kernels"
    result = to_result(name, rows, device_figures()["device"], commit or git_commit())
    for name, figure in speedups(rows).items():
        typer.echo(f"{name:30} {figure.value:6.2f} {figure.unit}  {figure.note}")
    if out is not None or not tiny:
        typer.echo(f"written: {result.write(out or RESULTS).name}")


if __name__ == "__main__":
    run(main)
