"""Queries, keys and values by Triton kernels: `pallas_kernels.heads` in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

# Each an array, the scale of queries, the scale of keys.
Projections = Sequence[tuple[Float[Array, "B _ _"], Float[Array, " D"], Float[Array, " D"]]]
# Heads of one program, and its warps: eight heads of 128 channels are a 16-byte load a thread.
SOME, WARPS = 8, 4


def settings(
    strides: Sequence[int], *, heads: int, group: int, width: int, eps: float
) -> dict[str, int | float]:
    """The constants of a compilation, as `triton_heads_kernel` names them.

    Args:
      strides: channels of a row of the first and of the last projection.
      heads, group, width: how many there are, how many are written together, and channels of one.
      eps: of the norms.
    """
    first, last = strides[0], strides[-1]
    return {
        "FIRST_STRIDE": first,
        "SECOND_STRIDE": last,
        "HEADS": heads,
        "WIDTH": width,
        "SOME": SOME,
        "EPS": eps,
        "GROUP": group,
    }


def attention_heads(
    projections: Projections,
    cos: Float[Array, "L D2"],
    sin: Float[Array, "L D2"],
    *,
    heads: int,
    eps: float,
) -> list[Float[Array, "B L H D"]]:
    """As `pallas_kernels.attention_heads`, of one or two projections, from checked arguments.

    Returns:
      q, k, v.
    """
    from pallas_kernels import triton_heads_kernel

    array = projections[0][0]
    shape = (array.shape[0], cos.shape[0], heads, 2 * cos.shape[1])
    return _call(
        triton_heads_kernel.normalize_and_rotate,
        [jax.ShapeDtypeStruct(shape, array.dtype)] * 3,
        projections,
        cos,
        sin,
        heads=heads,
        group=heads,
        eps=eps,
    )


def grouped_heads(
    projections: Projections,
    cos: Float[Array, "L D2"],
    sin: Float[Array, "L D2"],
    *,
    heads: int,
    groups: int,
    eps: float,
) -> Float[Array, "G 3 B L h D"]:
    """As `pallas_kernels.grouped_heads`, likewise."""
    from pallas_kernels import triton_heads_kernel

    array, group = projections[0][0], heads // groups
    shape = (groups, 3, array.shape[0], cos.shape[0], group, 2 * cos.shape[1])
    return _call(
        triton_heads_kernel.normalize_and_rotate_grouped,
        jax.ShapeDtypeStruct(shape, array.dtype),
        projections,
        cos,
        sin,
        heads=heads,
        group=group,
        eps=eps,
    )


def _call(
    kernel: Any,
    out_shape: Any,
    projections: Projections,
    cos: Array,
    sin: Array,
    *,
    heads: int,
    group: int,
    eps: float,
) -> Any:
    # Optional, and not on every machine that this is checked on.
    import jax_triton  # pyright: ignore[reportMissingImports]

    first, last = projections[0], projections[-1]
    batch, tokens = first[0].shape[:2]
    length, width = cos.shape[0], 2 * cos.shape[1]
    strides = [one[0].shape[-1] for one in projections]
    constants: dict[str, Any] = settings(strides, heads=heads, group=group, width=width, eps=eps)
    return jax_triton.triton_call(
        *first,
        *last,
        cos,
        sin,
        tokens,
        length,
        kernel=kernel,
        out_shape=out_shape,
        grid=(batch * length, -(-heads // SOME)),
        num_warps=WARPS,
        num_stages=1,
        **constants,
    )
