"""Times of every backend and of the dense products they replace, in one run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import api, reference
from pallas_kernels.backends import BACKENDS, device_of, why_not
from pallas_kernels.packing import group_count, pack_codes
from pallas_kernels.shapes import FEW as FEW
from pallas_kernels.shapes import MANY as MANY
from pallas_kernels.shapes import SMALL as SMALL
from pallas_kernels.shapes import sets_of
from pallas_kernels.tiles import FEW_ROWS
from pallas_kernels.timing import compile_calls, device_ms, median_ms

# What is timed.
BF16_DOT, INT8_DOT = "bf16 dot", "int8 dot"
A16, A8, A8_PRODUCT, QUANTIZE = "A16", "A8", "A8 product", "quantize"
RANK = 64
A16_RANK, A8_RANK = f"A16 rank {RANK}", f"A8 product rank {RANK}"
NORMALIZE = "normalize, quantize"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One time.

    Attributes:
      m, k, n: tokens, inputs, outputs.
      what: "bf16 dot" and "int8 dot" (to int32) are XLA's, of dense random weights; "A16" and
        "A8" are the op from bfloat16 to bfloat16 with scale and bias; "A8 product" is that of
        activations quantised before; "... rank 64" has a low-rank branch too, made before;
        "quantize" and "normalize, quantize" are those of the m x k
        activations.
      backend: "xla" or one of `BACKENDS`.
      ms: median, of one call in a queue.
      tops: 1e12 operations a second, two for each weight and token; 0 where nothing is multiplied.
      device_ms: of a few tokens, what the device took for a call; None where that is not told.
    """

    m: int
    k: int
    n: int
    what: str
    backend: str
    ms: float
    tops: float
    device_ms: float | None = None

    @property
    def compared_ms(self) -> float:
        """The time that is compared: a queue of calls of a few microseconds measures the host."""
        return self.ms if self.device_ms is None else self.device_ms


def backends_here() -> dict[str, str | None]:
    """Each backend, and why it cannot run on the default device; None if it can."""
    device = device_of(None)
    return {name: why_not(name, device, jnp.bfloat16, jnp.bfloat16, 16) for name in BACKENDS}


def weights(key: Any, n: int, k: int, grouped: bool = False) -> tuple[Any, Any, Any]:
    """Random (packed, scale, bias)."""
    codes, scale, bias = jax.random.split(key, 3)
    shape = (n, group_count(k)) if grouped else (n,)
    return (
        pack_codes(jax.random.randint(codes, (n, k), 0, 3, jnp.uint8)),
        jax.random.uniform(scale, shape, jnp.float32, 0.01, 0.05),
        jax.random.normal(bias, (n,), jnp.bfloat16),
    )


def activations(key: Any, m: int, k: int) -> Any:
    """Random (m, k) bfloat16."""
    return jax.random.normal(key, (m, k), jnp.bfloat16)


def time_shape(m: int, k: int, n: int, *, backends: tuple[str, ...], repeats: int) -> Iterator[Row]:
    """Times one shape, XLA's dense products first; rows come as they are measured.

    Args:
      m, k, n: tokens, inputs, outputs.
      backends: of `BACKENDS`, all of which can run here.
      repeats: timings of each median.
    """
    keys = jax.random.split(jax.random.key(m + n + k), sets_of(m, k, n))
    make = jax.jit(lambda key: (activations(key, m, k), *weights(jax.random.fold_in(key, 1), n, k)))
    sets = [make(key) for key in keys]

    calls = [*_dense_calls(sets, k), *_calls(sets, backends)]
    # Timed only when nothing is compiled any more: lowering takes the host's time.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda call: compile_calls(call.function, call.arguments), calls)
        programs = list(compiled)
    for call, program in zip(calls, programs, strict=True):
        arguments = call.arguments
        ms = median_ms(call.function, arguments, repeats=repeats, program=program)
        alone = device_ms(program, arguments) if m <= FEW_ROWS else None
        multiplies = call.what not in (QUANTIZE, NORMALIZE)
        tops = 2e-9 * m * n * k / (alone or ms) if multiplies else 0.0
        kind = {"what": call.what, "backend": call.backend}
        yield Row(m=m, k=k, n=n, **kind, ms=ms, tops=tops, device_ms=alone)


class _Call(NamedTuple):
    """What is timed: a function, and sets of its arguments to rotate."""

    what: str
    backend: str
    function: Callable[..., Any]
    arguments: list[Any]


def _dense_calls(sets: list[Any], k: int) -> Iterator[_Call]:
    contract_last = (((1,), (1,)), ((), ()))

    def dot(x: Any, w: Any) -> Any:
        return jax.lax.dot_general(x, w, contract_last)

    def to_int32(x: Any, w: Any) -> Any:
        return jax.lax.dot_general(x, w, contract_last, preferred_element_type=jnp.int32)

    # Spread out, as what a ternary weight replaces: of signs alone a product takes less power, and
    # so less time.
    shape = (sets[0][1].shape[0], k)
    keys = jax.random.split(jax.random.key(1), len(sets))
    wide = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    narrow = [jax.random.randint(key, shape, -127, 128, jnp.int8) for key in keys]
    rows = [s[0] for s in sets]
    yield _Call(BF16_DOT, "xla", dot, list(zip(rows, wide, strict=True)))
    quantized = [_quantize(x)[0] for x in rows]
    yield _Call(INT8_DOT, "xla", to_int32, list(zip(quantized, narrow, strict=True)))


def _calls(sets: list[Any], backends: Sequence[str]) -> Iterator[_Call]:
    quantized = [(*_quantize(s[0]), *s[1:]) for s in sets]
    rows = [s[:1] for s in sets]
    (m, _), n = sets[0][0].shape, sets[0][1].shape[0]
    keys = jax.random.split(jax.random.key(2), len(sets))
    branches = [(activations(key, m, RANK), activations(key, n, RANK)) for key in keys]
    for name in backends:
        yield _Call(A16, name, _op(name, 16), sets)
        yield _Call(A8, name, _op(name, 8), sets)
        yield _Call(A8_PRODUCT, name, _quantized_op(name), quantized)
        if m > FEW_ROWS:
            for what, op, some in (
                (A16_RANK, _op(name, 16), sets),
                (A8_RANK, _quantized_op(name), quantized),
            ):
                beside = [(*s, branch) for s, branch in zip(some, branches, strict=True)]
                yield _Call(what, name, op, beside)
        if name != "triton":
            yield _Call(QUANTIZE, name, _quantizer(name), rows)
            yield _Call(NORMALIZE, name, _normalizer(name), [(x, x[0], x[0]) for (x,) in rows])


_quantize = jax.jit(reference.quantize_activations)


def _op(backend: str, bits: int) -> Callable[..., Any]:
    def run(x: Any, packed: Any, scale: Any, bias: Any, low_rank: Any = None) -> Any:
        options: dict[str, Any] = {"activation_bits": bits, "backend": backend}
        return api.ternary_matmul(x, packed, scale, bias, low_rank=low_rank, **options)

    return run


def _quantized_op(backend: str) -> Callable[..., Any]:
    def run(
        q: Any,
        token_scale: Any,
        row_sum: Any,
        packed: Any,
        scale: Any,
        bias: Any,
        low_rank: Any = None,
    ) -> Any:
        rows: dict[str, Any] = {"token_scale": token_scale, "row_sum": row_sum}
        bits: dict[str, Any] = {"activation_bits": 8, "backend": backend}
        return api.ternary_matmul(q, packed, scale, bias, low_rank=low_rank, **rows, **bits)

    return run


def _quantizer(backend: str) -> Callable[..., Any]:
    return lambda x: api.quantize_activations(x, backend=backend)


def _normalizer(backend: str) -> Callable[..., Any]:
    return lambda x, gain, shift: api.normalize_and_quantize(x, gain, shift, backend=backend)


def ratio_to_dense(
    rows: list[Row],
    what: str,
    backend: str,
    bf16_elsewhere: Mapping[tuple[int, int, int], float] | None = None,
) -> dict[tuple[int, int, int], float]:
    """How many times as fast as XLA's dense product, by `Row.compared_ms`, where there are both.

    "A8 product" is compared with the int8 dot, everything else with the bf16 dot.

    Args:
      rows: what was measured.
      what, backend: of a row.
      bf16_elsewhere: milliseconds of a shape's bf16 product by another library: the faster of both
        is what is compared with.
    """
    exact = what in (A8_PRODUCT, A8_RANK)
    dense = INT8_DOT if exact else BF16_DOT
    base = {(r.m, r.k, r.n): r.compared_ms for r in rows if r.what == dense}
    if not exact:
        others = bf16_elsewhere or {}
        base = {shape: min(ms, others.get(shape, ms)) for shape, ms in base.items()}
    ours = {(r.m, r.k, r.n): r.compared_ms for r in rows if r.what == what and r.backend == backend}
    return {shape: base[shape] / ours[shape] for shape in ours if shape in base}


def table(rows: list[Row]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"{'shape':>20}  {'what':20} {'backend':8} {'ms':>9} {'device':>9} {'TOP/s':>7}  over XLA's"
    ]
    for row in rows:
        ratio = ratio_to_dense(rows, row.what, row.backend).get((row.m, row.k, row.n))
        compared = ratio is not None and row.tops and row.backend != "xla"
        lines.append(
            f"{f'{row.m}x{row.k}->{row.n}':>20}  {row.what:20} {row.backend:8} {row.ms:9.4f} "
            + (f"{row.device_ms:9.4f}" if row.device_ms else 9 * " ")
            + f" {row.tops:7.0f}  "
            + (f"{ratio:.2f}x" if compared else "")
        )
    return lines
