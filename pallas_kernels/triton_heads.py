"""Queries, keys and values by a Triton kernel: `pallas_kernels.heads` in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

# Heads of one program, and its warps: eight heads of 128 channels are a 16-byte load a thread.
SOME, WARPS = 8, 4


def settings(
    strides: Sequence[int], *, heads: int, width: int, eps: float
) -> dict[str, int | float]:
    """The constants of a compilation, as `triton_heads_kernel` names them.

    Args:
      strides: channels of a row of the first and of the last projection.
      heads, width: how many there are, and channels of one.
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
    }


def attention_heads(
    projections: Sequence[tuple[Float[Array, "B _ _"], Float[Array, " D"], Float[Array, " D"]]],
    cos: Float[Array, "L D2"],
    sin: Float[Array, "L D2"],
    *,
    heads: int,
    eps: float,
) -> list[Float[Array, "B L H D"]]:
    """As `pallas_kernels.attention_heads`, of one or two projections, from checked arguments.

    Args:
      projections: (array, scale of queries, scale of keys) of each.

    Returns:
      q, k, v.
    """
    # Optional, and not on every machine that this is checked on.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels import triton_heads_kernel

    first, last = projections[0], projections[-1]
    array = first[0]
    batch, length, width = array.shape[0], cos.shape[0], 2 * cos.shape[1]
    shape = jax.ShapeDtypeStruct((batch, length, heads, width), array.dtype)
    constants: dict[str, Any] = settings(
        [one[0].shape[-1] for one in projections], heads=heads, width=width, eps=eps
    )
    return jax_triton.triton_call(
        *first,
        *last,
        cos,
        sin,
        array.shape[1],
        length,
        kernel=triton_heads_kernel.normalize_and_rotate,
        out_shape=[shape] * 3,
        grid=(batch * length, -(-heads // SOME)),
        num_warps=WARPS,
        num_stages=1,
        **constants,
    )
