"""Times packed-ternary products on this GPU, and beside them XLA's dense products and gemlite's.

    python -m benchmarks.ternary_kernels

The shapes are the products of one FLUX.1-dev step at 1024 x 1024 (4608 tokens), and its modulation
at 1 and 16 rows. Medians over programs that call a product once for each of several sets of inputs,
more than the cache holds; see `pallas_kernels.bench` for what is in each time.

- *_device_ms: of a few rows, whose calls in a queue wait for the host: from the first kernel of a
  program to the end of its last, by the profiler, for one call. gemlite's calls are replayed from a
  CUDA graph, which is the same; few rows are compared by these.
- a16, a8: the op from bfloat16 to bfloat16, with scale and bias; a8 quantises its activations.
- a8_product: from activations that are quantised already.
- *_rank64: the same with a low-rank branch of 64 columns.
- *_speedup: geometric mean over the shapes, of a dense time over ours: of bf16 the faster of XLA's
  dot and torch's linear, of a8_product XLA's int8 dot, whose int32 result is left unscaled.
- over_gemlite_*: the same of gemlite's time over ours: of A16 for A16, and for A8 the faster of its
  two; *_worst: of the shape where it is least. See `benchmarks.peers.gemlite_linear`.
- *_branch: a product's time with a low-rank branch, over that without.

Writes `benchmarks/results/ternary_kernels_<gpu>.json`.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, Commit, Figure, OutOrNone, Peer, Result, Tiny, run
from benchmarks.machine import device_figures, git_commit, package_versions
from benchmarks.processes import run_module
from flux_jax.errors import UserError
from pallas_kernels import bench
from pallas_kernels.bench import Row

NAMES = {
    bench.BF16_DOT: "bf16_dot",
    bench.INT8_DOT: "int8_dot",
    bench.A16: "a16",
    bench.A8: "a8",
    bench.A8_PRODUCT: "a8_product",
    bench.A16_RANK: "a16_rank64",
    bench.A8_RANK: "a8_product_rank64",
    bench.QUANTIZE: "quantize",
    bench.NORMALIZE: "normalize_quantize",
}
# The rate of int8 over bf16 on the tensor cores; and a quarter of the bytes of int8's weights.
LIMITS = {bench.A16: 1.05, bench.A8: 2.0, bench.A8_PRODUCT: 1.05}
FEW_ROWS, FEW_LIMIT = 16, 8.0
# The peer's figures of which the fastest is compared with, and what it is called.
GEMLITE = {
    bench.A16: (("a16",), "gemlite's A16W158"),
    bench.A8: (("a16", "a8"), "the faster of gemlite's A16W158 and A8W158"),
}
BRANCHES = {bench.A16_RANK: bench.A16, bench.A8_RANK: bench.A8_PRODUCT}


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
        if row.device_ms is not None:
            name = f"{backend}{NAMES[row.what]}_device_ms/{shape_name(row)}"
            figures[name] = Figure(value=row.device_ms, unit="ms", note="first kernel to last")
    return figures


Shape = tuple[int, int, int]


def torch_bf16(measured: Mapping[str, Any] | None) -> dict[Shape, float]:
    """Milliseconds of torch's bf16 linear by shape, from what `time_gemlite` gives."""
    timings = [] if measured is None else measured["timings"]
    return {tuple(one["shape"]): one["ms"] for one in timings if one["what"] == "bf16_linear"}


def speedups(rows: list[Row], torch: Mapping[Shape, float]) -> dict[str, Figure]:
    """Geometric means over the shapes of many rows, and over those of few."""
    both = {(row.m, row.k, row.n) for row in rows} <= set(torch)
    # Of each shape, or of none.
    torch = torch if both else {}
    bf16 = "the faster of XLA's bf16 dot and torch's bf16 linear" if both else "XLA's bf16 dot"
    figures = {}
    for backend in dict.fromkeys(row.backend for row in rows if row.backend != "xla"):
        prefix = "" if backend == "mosaic" else f"{backend}_"
        for what, limit in LIMITS.items():
            ratios = bench.ratio_to_dense(rows, what, backend, torch)
            for few in (False, True):
                chosen = [v for (m, _, _), v in ratios.items() if (m <= FEW_ROWS) == few]
                # An int8 dot of a few rows is bound by its weights, as everything there is.
                if chosen and not (few and what == bench.A8_PRODUCT):
                    name = f"{prefix}{'few_' * few}{NAMES[what]}_speedup"
                    mean = statistics.geometric_mean(chosen)
                    over = "XLA's int8 dot" if what == bench.A8_PRODUCT else bf16
                    note = f"over {over}; the limit is {FEW_LIMIT if few else limit}"
                    figures[name] = Figure(value=mean, unit="x", note=note)
    return figures


def branches(rows: list[Row]) -> dict[str, Figure]:
    """What a low-rank branch costs: geometric means over the shapes."""
    times = {(row.backend, row.what, row.m, row.k, row.n): row.ms for row in rows}
    figures = {}
    for backend in dict.fromkeys(row.backend for row in rows if row.backend != "xla"):
        prefix = "" if backend == "mosaic" else f"{backend}_"
        for what, alone in BRANCHES.items():
            ratios = [
                row.ms / times[backend, alone, row.m, row.k, row.n]
                for row in rows
                if (row.backend, row.what) == (backend, what)
            ]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                figures[f"{prefix}{NAMES[alone]}_branch"] = Figure(
                    value=mean, unit="x", note=f"of the time without; rank {bench.RANK}"
                )
    return figures


def time_gemlite(shapes: Iterable[tuple[int, int, int]], repeats: int) -> dict[str, Any] | None:
    """What `benchmarks.peers.gemlite_linear` wrote; None, once it is told why, without it."""
    if importlib.util.find_spec("gemlite") is None:
        typer.echo("gemlite is left out: it is not installed (pip install gemlite)", err=True)
        return None
    names = ",".join("x".join(map(str, shape)) for shape in shapes)
    arguments = ("--shapes", names, "--repeats", str(repeats))
    try:
        return run_module("benchmarks.peers.gemlite_linear", *arguments)
    except RuntimeError as error:
        typer.echo(f"gemlite is left out: {error}", err=True)
        return None


def gemlite_times(measured: Mapping[str, Any]) -> dict[str, Figure]:
    """A figure for each of the peer's times, under the names of ours."""
    figures = {}
    for one in measured["timings"]:
        m, k, n = one["shape"]
        note = f"{one['how']}, off by {one['error']:.1%}"
        if one["what"] != "bf16_linear":
            note += f", autotuned: {measured['autotune']}"
        name = f"{one['what']}_ms/{m}x{k}x{n}"
        figures[name] = Figure(value=one["ms"], unit="ms", note=note)
    return figures


def over_gemlite(rows: list[Row], measured: Mapping[str, Any]) -> dict[str, Figure]:
    """How many times as fast as gemlite: geometric means as in `speedups`, and the worst."""
    theirs = {(one["what"], *one["shape"]): one["ms"] for one in measured["timings"]}
    figures = {}
    for backend in dict.fromkeys(row.backend for row in rows if row.backend != "xla"):
        prefix = "" if backend == "mosaic" else f"{backend}_"
        for what, (keys, name) in GEMLITE.items():
            ratios = {}
            for row in rows:
                shape = (row.m, row.k, row.n)
                known = [theirs[key, *shape] for key in keys if (key, *shape) in theirs]
                # What is called the faster of two is none where one is missing.
                if (row.backend, row.what) == (backend, what) and len(known) == len(keys):
                    ratios[row] = min(known) / row.compared_ms
            over = f"over {name}, autotuned: {measured['autotune']}"
            for few in (False, True):
                chosen = [v for row, v in ratios.items() if (row.m <= FEW_ROWS) == few]
                if chosen:
                    note = f"{over}; {len(chosen)} shapes"
                    mean = Figure(value=statistics.geometric_mean(chosen), unit="x", note=note)
                    figures[f"{prefix}{'few_' * few}over_gemlite_{NAMES[what]}"] = mean
            if ratios:
                worst = min(ratios, key=lambda row: ratios[row])
                figures[f"{prefix}over_gemlite_{NAMES[what]}_worst"] = Figure(
                    value=ratios[worst], unit="x", note=f"{over}; {shape_name(worst)}"
                )
    return figures


def to_result(
    benchmark: str,
    rows: list[Row],
    device: str,
    commit: str,
    gemlite: Mapping[str, Any] | None = None,
) -> Result:
    """The result file: ours, and XLA's dense products and gemlite's ternary ones as peers."""
    dense = [row for row in rows if row.backend == "xla"]
    ours = [row for row in rows if row.backend != "xla"]
    peers = {"XLA, dense": Peer(versions=package_versions("jax"), figures=times(dense))}
    figures = speedups(rows, torch_bf16(gemlite)) | branches(rows)
    if gemlite is not None:
        peers["gemlite"] = Peer(versions=gemlite["versions"], figures=gemlite_times(gemlite))
        figures |= over_gemlite(rows, gemlite)
    return Result(
        benchmark=benchmark,
        device=device,
        commit=commit,
        figures={**figures, **times(ours)},
        peers=peers,
        versions=package_versions("jax", "jaxlib", "jax-triton", "triton"),
    )


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timings that each median is over.")] = 15,
    gemlite: Annotated[bool, typer.Option(help="Time gemlite too, where it is installed.")] = True,
    tiny: Tiny = False,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Time packed-ternary products, XLA's dense ones and gemlite's."""
    shapes = bench.SMALL if tiny else (*bench.MANY, *bench.FEW)
    # First: once JAX has the device, it keeps most of the memory.
    measured = time_gemlite(shapes, repeats) if gemlite else None
    names = tuple(name for name, reason in bench.backends_here().items() if reason is None)
    kernels = tuple(name for name in names if name != "jax")
    if not tiny and not kernels:
        raise UserError("needs an NVIDIA GPU from Ampere on; --tiny runs anywhere")
    rows = []
    for m, k, n in shapes:
        for row in bench.time_shape(m, k, n, backends=kernels or names, repeats=repeats):
            rows.append(row)
            typer.echo(f"{shape_name(row):>18} {row.what:20} {row.backend:7} {row.ms:9.4f} ms")
    name = "ternary_kernels_tiny" if tiny else "ternary_kernels"
    device = device_figures()["device"]
    result = to_result(name, rows, device, commit or git_commit(), measured)
    for name, figure in result.figures.items():
        if figure.unit == "x":
            typer.echo(f"{name:30} {figure.value:6.2f} {figure.unit}  {figure.note}")
    if out is not None or not tiny:
        typer.echo(f"written: {result.write(out or RESULTS).name}")


if __name__ == "__main__":
    run(main)
