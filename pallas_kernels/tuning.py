"""The search for the tile of a product: which are tried, and which is fastest."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic, reference, triton_matmul
from pallas_kernels.bench import activations, weights
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_CODES
from pallas_kernels.shapes import input_sets
from pallas_kernels.tile_table import Device, Entry
from pallas_kernels.tiles import (
    AHEAD,
    FEW_ROWS,
    LATE,
    SHARED,
    SHARED_BYTES,
    SIGN,
    TOP,
    AnyTile,
    DirectTile,
    FewTile,
    Problem,
    Tile,
    TritonTile,
    few_tile,
    mosaic_rule,
    shared_bytes,
    triton_rule,
)
from pallas_kernels.timing import Program, compile_calls, device_ms, median_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One tile and its time in milliseconds, or why it could not run."""

    tile: AnyTile
    ms: float | None
    failure: str = ""


def candidates(backend: str, problem: Problem, device: Device) -> list[AnyTile]:
    """What is tried: first what the rules say, then what has been fast for such products."""
    if backend == "triton":
        first = triton_rule(problem)
        return list(dict.fromkeys([first, *_triton(first)]))
    rule = mosaic_rule(problem, device.multiprocessors)
    if isinstance(rule, DirectTile):
        tried = [*_direct(problem, device.multiprocessors), *_few(problem)]
    else:
        tried = _few(problem) if isinstance(rule, FewTile) else _many(problem)
    fitting = [tile for tile in tried if shared_bytes(tile, problem) <= SHARED_BYTES]
    return list(dict.fromkeys([rule, *fitting]))


def _triton(rule: TritonTile) -> list[TritonTile]:
    change = dataclasses.replace
    if rule.split:
        # Larger tiles share what is read of x; smaller ones, and fewer stages, leave more programs
        # to a multiprocessor.
        sizes = ((16, 2, 3), (16, 4, 3), (32, 2, 3), (32, 4, 3), (32, 4, 2), (64, 2, 3), (64, 4, 2))
        return [change(rule, outputs=n, warps=warps, stages=s) for n, warps, s in sizes]
    return [
        change(rule, stages=2),
        change(rule, stages=4),
        change(rule, planes=1, passes=False),
        change(rule, planes=2, passes=False),
        change(rule, planes=4, passes=False),
        change(rule, planes=1, passes=True),
        change(rule, tokens=64),
        change(rule, tokens=256),
        # Half the decoding for each product: more tokens share what is decoded.
        change(rule, tokens=256, planes=2, passes=False, stages=2),
        # Two programs a multiprocessor: one decodes while the other multiplies. 16-bit activations
        # leave room for two only with one plane at a time.
        change(rule, outputs=64, tokens=256, warps=4),
        change(rule, outputs=64, tokens=256, warps=4, planes=1),
        change(rule, outputs=128, tokens=128, warps=4, planes=1),
        change(rule, outputs=64, warps=4),
        change(rule, band=16),
    ]


def _direct(problem: Problem, multiprocessors: int) -> list[DirectTile]:
    change = dataclasses.replace
    own = [DirectTile(rows=rows, activations=a) for rows in (32, 64) for a in (AHEAD, LATE)]
    # Several warpgroups are fast only where their registers leave room for two blocks.
    own.append(DirectTile(groups=2, activations=LATE))
    # One or two blocks for each multiprocessor, and all at once: the largest has as little to do as
    # can be, and tokens are read by as few blocks as there are.
    blocks = -(-problem.k // BLOCK_CODES)
    shared = []
    for waves in (1, 2):
        outputs = max(64, 16 * -(-problem.n // (16 * waves * multiprocessors)))
        for groups, rows in itertools.product((1, 2, 3), range(32, 97, 16)):
            try:
                tile = DirectTile(groups=groups, rows=rows, outputs=outputs, activations=SHARED)
            except ValueError:
                continue
            stages = -(-blocks // tile.shares)
            shared += [change(tile, stages=min(stages, most)) for most in (2, 3)]
    return own + shared


def _few(problem: Problem) -> list[FewTile]:
    shapes = ((4, 2), (4, 3), (2, 2), (2, 3), (1, 4))
    tokens = few_tile(problem).tokens
    return [FewTile(tokens=tokens, groups=groups, stages=s) for groups, s in shapes]


def _many(problem: Problem) -> list[Tile]:
    if problem.grouped:
        sizes: tuple[dict[str, Any], ...] = (
            {"tokens": 64},
            {"tokens": 64, "stages": 6},
            {"tokens": 64, "planes": 2},
            {"tokens": 64, "planes": 2, "stages": 6},
            {"tokens": 128, "rows": 64},
            {"tokens": 128, "rows": 64, "planes": 2},
            {"tokens": 96, "rows": 64},
        )
        return [Tile(**size, decode=SIGN) for size in sizes]
    if problem.activation_bits == 16:
        wide = {"tokens": 144, "planes": 2, "stages": 3, "code_stages": 3, "store": 48}
        sizes = (
            {"planes": 2},
            {"planes": 1, "stages": 8},
            # Half the decoding for each product: 256 tokens share what is decoded.
            {"rows": 64, "tokens": 256, "planes": 1, "stages": 5},
            {"rows": 64, "tokens": 192, "planes": 1, "stages": 6, "lag": 1},
            {"rows": 64, "tokens": 192, "planes": 1, "stages": 6},
            {"rows": 64, "tokens": 256, "planes": 1, "stages": 5, "flight": 1},
            # Of 3072 outputs and 4608 tokens, on 132 multiprocessors: 192 tokens fill 4.4 waves of
            # tiles, these 3.8 and 4.9.
            {"rows": 64, "tokens": 224, "planes": 1, "stages": 5, "lag": 1},
            {"rows": 64, "tokens": 176, "planes": 1, "stages": 6, "lag": 1, "store": 16},
            # Three waves where 3072 outputs of 4608 tokens would else be four.
            {**wide, "flight": 1},
            {**wide, "flight": 0},
        )
        return [
            Tile(**size, along_n=along_n, decode=decode)
            for decode in (SIGN, TOP)
            for along_n in (False, True)
            for size in sizes
        ]
    sizes = (
        {},
        {"planes": 2, "stages": 8, "lag": 1},
        {"tokens": 144, "stages": 3, "code_stages": 3, "store": 48, "flight": 1},
        {"rows": 64, "tokens": 256, "planes": 2, "stages": 4, "lag": 1},
        {"rows": 64, "tokens": 128, "stages": 5},
        {"rows": 64, "tokens": 64, "stages": 6},
        # Of a share of an image's tokens there are few tiles: smaller ones fill the last wave.
        # Of four planes, so that a stage has room for a low-rank branch.
        {"tokens": 112, "store": 16},
        {"tokens": 112, "store": 16, "lag": 1, "flight": 2},
        {"tokens": 96, "stages": 5},
        {"tokens": 96, "lag": 1, "flight": 2},
        {"rows": 64, "tokens": 32, "stages": 6},
    )
    tiles = [Tile(**size, along_n=along_n) for along_n in (False, True) for size in sizes]
    return [*tiles, Tile(band=16), Tile(band=16, along_n=True)]


# What follows x and packed.
OPERANDS = ("scale", "bias", "token_scale", "row_sum")


def arguments(problem: Problem) -> list[tuple[Any, ...]]:
    """Sets of (x, packed, *`OPERANDS`) to rotate.

    8-bit activations are quantised, and their sums are given, as in a model: without them a tile
    that decodes codes would not be what is timed.
    """
    m, n, k = problem.m, problem.n, problem.k

    def make(key: Any) -> tuple[Any, ...]:
        given = weights(key, n, k, problem.grouped)
        x, token_scale, row_sum = activations(jax.random.fold_in(key, 1), m, k), None, None
        if problem.activation_bits == 8:
            x, token_scale, row_sum = reference.quantize_activations(x)
        return (x, *given, token_scale, row_sum)

    itemsize = problem.activation_bits // 8
    keys = jax.random.split(jax.random.key(0), input_sets(n * k / 4 + itemsize * m * k))
    return [jax.jit(make)(key) for key in keys]


def multiplier(backend: str, problem: Problem, device: Device, tile: Any) -> Callable[..., Any]:
    """The product alone, with a given tile, of a set of `arguments`."""
    module: Any = triton_matmul if backend == "triton" else mosaic
    settings = {"activation_bits": problem.activation_bits, "out_dtype": jnp.bfloat16}

    def multiply(x: Any, packed: Any, *others: Any) -> Any:
        given = Operands(**dict(zip(OPERANDS, others, strict=True)))
        return module.ternary_matmul(x, packed, given, **settings, device=device, tile=tile)

    return multiply


def search(backend: str, problem: Problem, device: Device, *, repeats: int) -> Iterator[Trial]:
    """Times every candidate, in order; they are compiled side by side before."""
    sets = arguments(problem)
    tiles = candidates(backend, problem, device)
    calls = [multiplier(backend, problem, device, tile) for tile in tiles]
    # Timed only when nothing is compiled any more: lowering takes the host's time.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = [pool.submit(compile_calls, call, sets) for call in calls]
    for tile, call, program in zip(tiles, calls, programs, strict=True):
        try:
            ms = time_program(problem, call, sets, program.result(), repeats)
        # A tile beyond the device's registers or shared memory fails in as many ways as there are
        # compilers below; the search goes on, and says which.
        except Exception as error:
            yield Trial(tile=tile, ms=None, failure=f"{type(error).__name__}: {error}"[:200])
        else:
            yield Trial(tile=tile, ms=ms)


def time_program(
    problem: Problem, call: Callable[..., Any], sets: list[Any], program: Program, repeats: int
) -> float:
    """Milliseconds of one call; of few rows on the device, as a queue of those waits for the host.

    Args:
      problem: that the call solves.
      call, sets, program, repeats: as for `median_ms`.
    """
    alone = device_ms(program, sets) if problem.m <= FEW_ROWS else None
    return alone or median_ms(call, sets, repeats=repeats, program=program)


def fastest(backend: str, problem: Problem, trials: list[Trial]) -> Entry | None:
    """The table's entry for what was found; None if nothing ran."""
    timed = [(trial.ms, trial.tile) for trial in trials if trial.ms is not None]
    if not timed:
        return None
    ms, tile = min(timed, key=lambda pair: pair[0])
    today = datetime.date.today().isoformat()
    return Entry(
        backend=backend, problem=problem, tile=tile, ms=ms, jax=jax.__version__, date=today
    )
