"""Which arguments the ops refuse, whatever the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels.packing import GROUP, group_count, packed_width
from pallas_kernels.reference import Columns

ACTIVATION_BITS = (8, 16)
# Some kernels sum 64 times what they are to sum: of int8, within int32.
INT8_INPUTS = (2**31 - 1) // (127 * 64)


def check_matmul(
    x: Any,
    packed: Any,
    scale: Any,
    bias: Any = None,
    *,
    activation_bits: int,
    token_scale: Any = None,
    row_sum: Any = None,
    gate: Any = None,
    residual: Any = None,
    low_rank: Any = None,
    leave: int = 0,
) -> None:
    """Refuses what no backend could multiply.

    Raises:
      ValueError: naming the argument, what was expected and what was found.
    """
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits!r}")
    if leave < 0:
        raise ValueError(f"leave must be a number of multiprocessors, 0 or more, got {leave}")
    quantized = x.dtype == jnp.int8
    if x.ndim < 1 or not (quantized or jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(
            f"x must be floating or int8 with at least one axis, got {x.dtype} of shape {x.shape}"
        )
    if quantized and activation_bits != 8:
        raise ValueError(f"x of int8 needs activation_bits=8, got {activation_bits}")
    if quantized != (token_scale is not None):
        found = "none" if token_scale is None else f"one for x of {x.dtype}"
        raise ValueError(f"token_scale belongs to x of int8, and x of int8 needs it; got {found}")
    if packed.ndim != 2 or packed.dtype != jnp.uint8:
        raise ValueError(
            f"packed must be uint8 (N, Kp), got {packed.dtype} of shape {packed.shape}"
        )
    columns, rows = x.shape[-1], packed.shape[0]
    _check_width(x)
    if activation_bits == 8 and columns > INT8_INPUTS:
        raise ValueError(
            f"x must have at most {INT8_INPUTS} inputs with 8-bit activations, whose sums are of "
            f"32 bits, got {columns}"
        )
    if packed.shape[1] != packed_width(columns):
        raise ValueError(
            f"packed must have {packed_width(columns)} bytes a row for the {columns} inputs of x, "
            f"got {packed.shape[1]}"
        )
    grouped = (rows, group_count(columns))
    if scale.shape not in ((), (rows,), grouped):
        raise ValueError(
            f"scale must have shape () or ({rows},) or {grouped} (groups of {GROUP} inputs), got "
            f"{scale.shape}"
        )
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"scale must be floating, got {scale.dtype}")
    leading = x.shape[:-1]
    for name, value, shapes in (
        ("bias", bias, [(rows,)]),
        ("token_scale", token_scale, [leading]),
        ("gate", gate, vector_shapes(leading, rows)),
        ("residual", residual, [(*leading, rows)]),
    ):
        if value is not None:
            check_floating(name, value, shapes)
    if low_rank is not None:
        u, v = low_rank
        _check_low_rank(u, v, leading, rows)
    if row_sum is not None and (
        not quantized or row_sum.shape != leading or row_sum.dtype != jnp.int32
    ):
        raise ValueError(
            f"row_sum must be int32 of shape {leading}, of x of int8, got {row_sum.dtype} of shape "
            f"{row_sum.shape} for x of {x.dtype}"
        )


def _check_low_rank(u: Any, v: Any, leading: tuple[int, ...], rows: int) -> None:
    rank = u.shape[-1] if u.ndim else 0
    if not rank or u.shape[:-1] != leading or v.shape != (rows, rank):
        raise ValueError(
            f"low_rank must have shapes {(*leading, 'R')} and {(rows, 'R')} with R above 0, got "
            f"{u.shape} and {v.shape}"
        )
    if u.dtype != v.dtype or not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(f"low_rank must be of one floating type, got {u.dtype} and {v.dtype}")


def check_modulation(x: Any, gain: Any, shift: Any) -> None:
    """Refuses rows that cannot be quantised.

    Raises:
      ValueError: naming the argument, what was expected and what was found.
    """
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating with at least one axis, got {x.dtype} of shape {x.shape}"
        )
    _check_width(x)
    for name, value in (("gain", gain), ("shift", shift)):
        if value is not None:
            check_floating(name, value, vector_shapes(x.shape[:-1], x.shape[-1]))


def _check_width(x: Any) -> None:
    if not x.shape[-1]:
        raise ValueError(f"x must have at least one input, got shape {x.shape}")


def check_columns(parts: Sequence[Columns]) -> None:
    """Refuses parts that are no columns of arrays with the same leading axes.

    Raises:
      ValueError: naming the part, what was expected and what was found.
    """
    if not parts:
        raise ValueError("parts must be one or more Columns, got none")
    leading = parts[0].array.shape[:-1]
    for index, part in enumerate(parts):
        found = f"got {part.array.dtype} of shape {part.array.shape}"
        if not jnp.issubdtype(part.array.dtype, jnp.floating):
            raise ValueError(f"parts[{index}] must be floating, {found}")
        if part.array.ndim < 1 or part.array.shape[:-1] != leading:
            raise ValueError(f"parts[{index}] must have leading axes {leading}, {found}")
        if not (0 <= part.start and 0 < part.size <= part.array.shape[-1] - part.start):
            last = part.start + part.size
            raise ValueError(f"parts[{index}] must have columns {part.start} to {last}, {found}")


def vector_shapes(leading: tuple[int, ...], width: int) -> list[tuple[int, ...]]:
    """What a vector for all tokens, or one for each of their first axis, may look like."""
    return [(width,), *([(leading[0], width)] if leading else [])]


def check_floating(name: str, value: Any, shapes: list[tuple[int, ...]]) -> None:
    """Refuses other shapes, and what is not floating."""
    if value.shape not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {value.shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {value.dtype}")
