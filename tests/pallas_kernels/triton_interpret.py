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

from pallas_kernels import triton_matmul
from pallas_kernels.checking import Case, check
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
)


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
    jax_triton: Any = types.ModuleType("jax_triton")
    jax_triton.triton_call = call
    sys.modules["jax_triton"] = jax_triton


def call(
    *arguments: Any,
    kernel: Any,
    out_shape: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> jax.Array:
    """`jax_triton.triton_call`, of a kernel with one result."""
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
    kind = kinds[jnp.dtype(out_shape.dtype).name]
    y = torch.full(out_shape.shape, torch.nan, dtype=kind)
    kernel[grid](*map(tensor, arguments), y, **constants)
    return jnp.asarray(y.to(torch.float32).numpy()).astype(out_shape.dtype)


def with_tile(tile: TritonTile) -> Callable[..., Any]:
    """The product with a tile, as `check` wants it."""

    def multiply(case: Case, **arrays: Any) -> Any:
        if case.activation_bits == 16:
            # What it multiplies of bfloat16 are the integers that the bits spell.
            arrays["x"] = arrays["x"].astype(jnp.float16)
        return triton_matmul.ternary_matmul(
            **arrays,
            activation_bits=case.activation_bits,
            out_dtype=jnp.dtype(case.out_dtype),
            gelu=case.gelu,
            device=Device(kind="interpreted", multiprocessors=1),
            tile=tile,
        )

    return multiply


def main() -> None:
    """Checks every case with every tile; exits with how many failed."""
    install()
    failed = 0
    for case in CASES:
        for tile in TILES:
            outcome = check(case, "triton", with_tile(tile), seed=5, runs=1)
            failed += not outcome.passed
            print(f"{'ok' if outcome.passed else 'WRONG'}: {outcome.error:.3g} {case} {tile}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
