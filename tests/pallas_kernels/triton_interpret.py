"""The Triton kernels in Triton's interpreter, on a CPU, called as jax-triton calls them.

    TRITON_INTERPRET=1 python -m tests.pallas_kernels.triton_interpret

A process of its own, because Triton reads that variable when it is imported. Its interpreter cannot
run the decoding of codes in registers, which is machine code: `decode` has a plain twin here. All
around it is what runs on a GPU. Needs Triton and PyTorch.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels import triton_heads, triton_matmul
from pallas_kernels.checking import Case, arguments, check
from pallas_kernels.heads import Projection, grouped, plain
from pallas_kernels.tile_table import Device
from pallas_kernels.tiles import TritonTile

MANY = TritonTile(outputs=32, tokens=16, band=2)
TILES = (
    MANY,
    dataclasses.replace(MANY, planes=2),
    dataclasses.replace(MANY, planes=2, passes=True),
    dataclasses.replace(MANY, planes=4),
    dataclasses.replace(MANY, planes=1, passes=True),
    TritonTile(outputs=16, tokens=8, warps=4, split=True),
    TritonTile(outputs=32, tokens=16, warps=2, split=True),
)
INT8 = Case(m=37, n=75, k=1040, integers=True, out_dtype="float32")
CASES = (
    INT8,
    dataclasses.replace(INT8, m=1, n=16, k=256, row_sum=False),
    # The interpreter cuts bfloat16 off instead of rounding to it.
    Case(m=9, n=50, k=700, extras=True, gelu=True, out_dtype="float16"),
    Case(m=12, n=33, k=513, activation_bits=16, extras=True, gates=2, out_dtype="float32"),
    Case(m=7, n=40, k=1285, granularity="group", extras=True, out_dtype="float32"),
    Case(
        m=18, n=40, k=900, activation_bits=16, granularity="group", gelu=True, out_dtype="float16"
    ),
    Case(m=6, n=17, k=256, activation_bits=16, granularity="tensor", out_dtype="float32"),
    Case(m=20, n=40, k=256, rank=64, gelu=True, extras=True, out_dtype="float16"),
    Case(m=9, n=33, k=256, activation_bits=16, rank=40, out_dtype="float32"),
)


def as_it_is(value, EXACT: tl.constexpr, CODES: tl.constexpr):
    """As `triton_kernels.prepare` and `unscaled`: here, signs are decoded as they are."""
    return value


def decode(packed, plane: tl.constexpr, dtype: tl.constexpr, CODES: tl.constexpr):
    """As `triton_kernels.decode`."""
    code = ((packed >> (2 * plane)) & 3).to(tl.int8)
    if not CODES:
        code = code - 1
    return code.to(dtype)


def install() -> None:
    """Makes `triton_matmul` call interpreted kernels."""
    from pallas_kernels import triton_kernels

    triton_kernels.decode = triton_kernels.jit(decode)
    triton_kernels.prepare = triton_kernels.unscaled = triton_kernels.jit(as_it_is)
    jax_triton: Any = types.ModuleType("jax_triton")
    jax_triton.triton_call = call
    sys.modules["jax_triton"] = jax_triton


def call(
    *arguments: Any,
    kernel: Any,
    out_shape: jax.ShapeDtypeStruct | list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> Any:
    """`jax_triton.triton_call`."""
    import torch

    del num_warps, num_stages

    def tensor(array: Any) -> Any:
        if not isinstance(array, jax.Array):
            return array
        if array.dtype == jnp.bfloat16:
            bits = np.array(jax.lax.bitcast_convert_type(array, jnp.uint16))
            return torch.from_numpy(bits).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

    def poisoned(shape: jax.ShapeDtypeStruct) -> Any:
        return torch.full(shape.shape, torch.nan, dtype=kinds[jnp.dtype(shape.dtype).name])

    def array(written: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(written.to(torch.float32).numpy()).astype(shape.dtype)

    results = jax.tree.map(poisoned, out_shape)
    kernel[grid](*map(tensor, arguments), *jax.tree.leaves(results), **constants)
    return jax.tree.map(array, results, out_shape)


def with_tile(tile: TritonTile) -> Callable[..., Any]:
    """The product with a tile, as `check` wants it."""

    def multiply(case: Case, **arrays: Any) -> Any:
        if case.activation_bits == 16:
            # What it multiplies of bfloat16 are the integers that the bits spell.
            arrays["x"] = arrays["x"].astype(jnp.float16)
        if case.rank:
            arrays |= {name: arrays[name].astype(jnp.float16) for name in ("u", "v")}
        return triton_matmul.ternary_matmul(
            *arguments(arrays),
            activation_bits=case.activation_bits,
            out_dtype=jnp.dtype(case.out_dtype),
            gelu=case.gelu,
            device=Device(kind="interpreted", multiprocessors=1),
            tile=tile,
        )

    return multiply


def check_heads(batch: int, lengths: tuple[int, ...], heads: int, width: int, groups: int) -> float:
    """The largest difference of what attention reads from plain JAX, in float16 steps at 1.

    Grouped, it must be the same bits.
    """
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float16)

    projections = [
        Projection(draw(batch, length, 3 * heads * width + 8), draw(width), draw(width))
        for length in lengths
    ]
    angles = rng.uniform(0, 6, (sum(lengths), width // 2))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    options: dict[str, Any] = {"heads": heads, "eps": 1e-6}
    found = triton_heads.attention_heads(projections, cos, sin, **options)
    wanted = plain(projections, cos, sin, **options)
    errors = [
        jnp.max(jnp.abs(got.astype(jnp.float32) - good.astype(jnp.float32)))
        for got, good in zip(found, wanted, strict=True)
    ]
    assert errors[2] == 0
    together = triton_heads.grouped_heads(projections, cos, sin, groups=groups, **options)
    assert jnp.array_equal(together, grouped(*found, groups))
    return float(max(errors[:2])) * 1024


HEADS_CASES = (
    (1, (3,), 8, 16, 4),
    (2, (2, 5), 3, 32, 3),
    (1, (1, 1), 9, 16, 3),
    (2, (3, 1), 12, 16, 2),
)


def main() -> None:
    """Checks every case with every tile; exits with how many failed."""
    install()
    failed = 0
    for heads_case in HEADS_CASES:
        steps = check_heads(*heads_case)
        # Values are below 8, where a step is eight times that at 1: one rounding may differ.
        failed += not steps <= 8
        print(f"{'ok' if steps <= 8 else 'WRONG'}: {steps:.3g} steps, heads {heads_case}")
    for case in CASES:
        for tile in TILES:
            outcome = check(case, "triton", with_tile(tile), seed=5, runs=1)
            failed += not outcome.passed
            print(f"{'ok' if outcome.passed else 'WRONG'}: {outcome.error:.3g} {case} {tile}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
