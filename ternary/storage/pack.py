"""Rounding a stored weight straight to base-3 bytes, in NumPy on all cores.

The quantiser of `ternary.quantize` for weights that are on their way from one file to another: a
block of rows is read once, and codes and bytes are made while it is in the cache. bf16 weights are
compared as integers, since their bits are ordered as their magnitudes are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from convert.tensors import BFLOAT16
from flux_jax.errors import UserError
from pallas_kernels import GROUP, group_count
from ternary.storage.base3 import base3_width, encode_block
from ternary.storage.threads import over_rows


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A rounded weight.

    Attributes:
      data: (N, P) base-3 bytes.
      scale: float16 (), (N,) or (N, G).
      relative_error: `norm(w - scale * signs) / norm(w)`; 0 for a weight of zeros.
    """

    data: UInt8[np.ndarray, "N P"]
    scale: Float[np.ndarray, "*scale"]
    relative_error: float


def quantize_weight(
    weight: Float[np.ndarray, "N K"],
    granularity: str,
    refit_steps: int = 0,
    *,
    what: str = "weight",
) -> Quantized:
    """Fit a scale, find the codes, pack them.

    Args:
      weight: (N, K), bfloat16, float16 or float32, C-contiguous.
      granularity: one of `ternary.config.GRANULARITIES`.
      refit_steps: least-squares refits after the absolute mean.
      what: name of the tensor, for messages.

    Raises:
      UserError: a value that is not finite, or a scale beyond float16.
    """
    rows, columns = weight.shape
    data = np.empty((rows, base3_width(columns)), np.uint8)
    shared = _tensor_scale(weight, refit_steps) if granularity == "tensor" else None

    def block(part: slice) -> tuple[np.ndarray, float, float]:
        # What is not finite becomes a scale that is not finite, which is refused below.
        with np.errstate(over="ignore", invalid="ignore"):
            magnitudes = _magnitudes(weight[part], granularity)
            scale = _row_scale(magnitudes, columns, refit_steps) if shared is None else shared
            stored = scale.astype(np.float16)
            spread = stored.astype(np.float32)
            half = np.where(spread > 0, spread / 2, np.float32(np.inf))
            encode_block(_codes(weight[part], half), data[part])
            return stored, *_errors(magnitudes, spread, half)

    results = over_rows(block, rows, columns)
    if shared is not None:
        with np.errstate(over="ignore"):
            scale = shared.astype(np.float16).reshape(())
    else:
        # (rows, 1) or (rows, G, 1) of each block.
        scale = np.concatenate([result[0] for result in results])[..., 0]
    if not np.isfinite(scale).all():
        raise UserError(
            f"tensor `{what}` has values that are not finite, or too large for a float16 scale"
        )
    error, norm = (sum(result[i] for result in results) for i in (1, 2))
    return Quantized(data, scale, float(np.sqrt(max(error, 0.0) / norm)) if norm else 0.0)


def _magnitudes(block: np.ndarray, granularity: str) -> np.ndarray:
    """|w| in float32, (rows, K), or (rows, G, 128) filled with zeros."""
    if block.dtype == BFLOAT16:
        bits = block.view(np.uint16) & np.uint16(0x7FFF)
        values = np.left_shift(bits, np.uint32(16), dtype=np.uint32).view(np.float32)
    else:
        values = np.abs(block.astype(np.float32, copy=False))
    return _grouped(values) if granularity == "group128" else values


def _grouped(values: np.ndarray) -> np.ndarray:
    rows, columns = values.shape
    groups = group_count(columns)
    if columns != groups * GROUP:
        values = np.pad(values, ((0, 0), (0, groups * GROUP - columns)))
    return values.reshape(rows, groups, GROUP)


def _row_scale(magnitudes: np.ndarray, columns: int, refit_steps: int) -> np.ndarray:
    """The fit along the last axis, kept as an axis of one."""
    number: Any = np.float32(columns)
    if magnitudes.ndim == 3:
        # The last group may be short; its filling is zero and counts nowhere.
        number = np.full((magnitudes.shape[1], 1), GROUP, np.float32)
        number[-1] -= magnitudes.shape[1] * GROUP - columns
    scale = magnitudes.sum(axis=-1, keepdims=True) / number
    for _ in range(refit_steps):
        kept = magnitudes > scale / 2
        number = kept.sum(axis=-1, keepdims=True, dtype=np.float32)
        total = (magnitudes * kept).sum(axis=-1, keepdims=True)
        scale = total / np.maximum(number, 1)
    return scale


def _tensor_scale(weight: np.ndarray, refit_steps: int) -> np.ndarray:
    """One scale for all, float32 (1, 1); sums of blocks are added in float64."""
    rows, columns = weight.shape

    def sums(part: slice, half: Any) -> tuple[float, float]:
        magnitudes = _magnitudes(weight[part], "tensor")
        if half is None:
            return float(magnitudes.sum(dtype=np.float64)), magnitudes.size
        kept = magnitudes > half
        return float(np.sum(magnitudes, where=kept, dtype=np.float64)), int(kept.sum())

    scale = np.zeros((1, 1), np.float32)
    for step in range(refit_steps + 1):
        if not np.isfinite(scale).all():
            # A refit would leave out what is NaN, and so hide it.
            break
        half = scale / 2 if step else None
        parts = over_rows(lambda part, half=half: sums(part, half), rows, columns)
        total, count = (sum(part[i] for part in parts) for i in (0, 1))
        scale = np.full((1, 1), total / max(count, 1), np.float32)
    return scale


def _codes(block: np.ndarray, half: np.ndarray) -> UInt8[np.ndarray, "N K"]:
    """1 + sign(w) where |w| > half; `half` is (1, 1), (rows, 1) or (rows, G, 1) float32."""
    if half.ndim == 3:
        half = np.repeat(half[..., 0], GROUP, axis=1)[:, : block.shape[1]]
    if block.dtype == BFLOAT16:
        # A bf16 magnitude is above `half` exactly if its bits are above those of `half` cut off to
        # bf16. As signed integers negative numbers are below all, as unsigned ones above all.
        limit = (half.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        positive = block.view(np.int16) > limit.view(np.int16)
        negative = block.view(np.uint16) > limit + np.uint16(0x8000)
    else:
        positive, negative = block > half, block < -half
    codes = positive.view(np.uint8)
    codes += np.uint8(1)
    codes -= negative.view(np.uint8)
    return codes


def _errors(magnitudes: np.ndarray, spread: np.ndarray, half: np.ndarray) -> tuple[float, float]:
    """Squared norms of the error and of the weight; rows in float32, their sum in float64."""
    # `np.where` would take ten times as long.
    left = np.multiply(magnitudes > half, spread, dtype=np.float32)
    left -= magnitudes
    error, norm = (np.einsum("...k,...k->...", a, a) for a in (left, magnitudes))
    return float(error.sum(dtype=np.float64)), float(norm.sum(dtype=np.float64))
