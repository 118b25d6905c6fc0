"""Packs and unpacks the weights of a full-size FLUX.1-dev transformer, in memory, on the CPU.

    python -m benchmarks.ternary_packing

Every ternary linear of FLUX.1-dev is timed in its own shape, on random bf16 values; linears of one
shape share one buffer, so that 24 GB are not needed. Times are the sum over all 304 linears of the
median of several runs. Reading and writing files is not in them.

- quantize: bf16 weights to scales and base-3 bytes (absolute mean, a scale per output), with the
  rounding error computed on the way. Bytes are those of the bf16 input.
- pack: codes, one a byte, to base-3 bytes. Bytes are those of the bf16 weights they stand for.
- unpack: base-3 bytes to codes, one a byte: bytes are those of the output.
- load: base-3 bytes straight to the 2-bit layout, as loading a checkpoint does. Counted twice: in
  weights (a byte each, to compare with unpack) and in bytes of 2-bit output.
- peer: `memcpy` of the bf16 weights by NumPy, on one core.

Writes `benchmarks/results/ternary_packing_<cpu>.json`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer

from benchmarks.common import RESULTS, Figure, OutOrNone, Peer, Result, Tiny, median_seconds, run
from benchmarks.machine import describe_hardware, package_versions
from flux_jax.configs import FluxConfig
from ternary.policy import Policy, select
from ternary.storage.base3 import base3_to_packed, pack_base3, unpack_base3
from ternary.storage.checkpoint import dense_shapes
from ternary.storage.format import WEIGHT
from ternary.storage.pack import quantize_weight


def ternary_shapes(config: FluxConfig) -> collections.Counter[tuple[int, ...]]:
    """How many ternary linears there are of each shape."""
    shapes = dense_shapes(config)
    names = [n.removesuffix(WEIGHT) for n, s in shapes.items() if n.endswith(WEIGHT)]
    return collections.Counter(shapes[name + WEIGHT] for name in select(names, Policy()))


def measure(config: FluxConfig, repeats: int) -> tuple[dict[str, float], int]:
    """Seconds of each operation over the whole model, and the number of ternary weights."""
    rng = np.random.Generator(np.random.SFC64(0))
    seconds: dict[str, float] = collections.defaultdict(float)
    weights = 0
    for shape, count in ternary_shapes(config).items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        weight = values.astype(ml_dtypes.bfloat16)
        del values
        data = quantize_weight(weight, "channel").data
        codes = unpack_base3(data, shape[1])
        copy = np.empty_like(weight)
        operations: dict[str, Callable[[], Any]] = {
            "quantize": lambda w=weight: quantize_weight(w, "channel"),
            "pack": lambda c=codes: pack_base3(c),
            "unpack": lambda d=data, k=shape[1]: unpack_base3(d, k),
            "load": lambda d=data, k=shape[1]: base3_to_packed(d, k),
            "memcpy": lambda w=weight, c=copy: np.copyto(c, w),
        }
        for name, operation in operations.items():
            once = median_seconds(
                operation, [()], wait=lambda output: None, repeats=repeats, warmup=1
            )
            seconds[name] += count * once
        weights += count * weight.size
    return dict(seconds), weights


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each operation.")] = 5,
    tiny: Tiny = False,
    out: OutOrNone = None,
) -> None:
    """Time packing and unpacking at full size."""
    config = FluxConfig.tiny() if tiny else FluxConfig.dev()
    seconds, weights = measure(config, repeats)
    figures = {
        "ternary_weights": Figure(value=weights, unit="count"),
        "quantize_s": Figure(value=seconds["quantize"], unit="s", note="bf16 to base-3 and scales"),
        "quantize": rate(2 * weights, seconds["quantize"], "of bf16 input"),
        "pack": rate(2 * weights, seconds["pack"], "of bf16 weights that the codes stand for"),
        "unpack": rate(weights, seconds["unpack"], "of output, a code a byte"),
        "load_s": Figure(value=seconds["load"], unit="s", note="base-3 to the 2-bit layout"),
        "load": rate(weights, seconds["load"], "of codes, were they a byte each"),
        "load_packed": rate(weights / 4, seconds["load"], "of 2-bit output"),
    }
    for name, figure in figures.items():
        typer.echo(f"{name:16} {figure.value:14.6g} {figure.unit:6} {figure.note}")
    result = Result(
        benchmark="ternary_packing_tiny" if tiny else "ternary_packing",
        device=str(describe_hardware()["cpu"]),
        figures=figures,
        peers={
            "memcpy, one core": Peer(
                versions=package_versions("numpy"),
                figures={"copy": rate(2 * weights, seconds["memcpy"], "of bf16 weights")},
            )
        },
        versions=package_versions("numpy", "ml_dtypes", "jax"),
    )
    if out is not None or not tiny:
        typer.echo(f"written: {result.write(out or RESULTS).name}")


def rate(nbytes: float, seconds: float, note: str) -> Figure:
    """GB, of 1e9 bytes, a second."""
    return Figure(value=nbytes / seconds / 1e9, unit="GB/s", note=note)


if __name__ == "__main__":
    run(main)
