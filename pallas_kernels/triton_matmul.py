"""The ternary product by Triton kernels: for Ampere and Ada, and anywhere Triton runs.

Triton and jax-triton are imported where they are needed: they are optional, and importing
jax-triton fails on a machine without a GPU plugin of JAX. The kernels are in `triton_kernels`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels import reference
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_BYTES
from pallas_kernels.reference import Activations
from pallas_kernels.tile_table import Device, triton_tile
from pallas_kernels.tiles import Problem, TritonTile


def settings(
    tile: TritonTile,
    *,
    n: int,
    width: int,
    exact: bool,
    codes: bool,
    grouped: bool,
    bias: bool,
    rank: int,
    gelu: bool,
    gates: int,
    residual: bool,
) -> dict[str, Any]:
    """The constants of a compilation, as `triton_kernels` names them."""
    constants = {
        "N": n,
        "WIDTH": width,
        "OUTPUTS": tile.outputs,
        "TOKENS": tile.tokens,
        "EXACT": exact,
        "CODES": codes,
        "GROUPED": grouped,
        "BIAS": bias,
        "RANK": rank,
        "GELU": gelu,
        "GATES": gates,
        "RESIDUAL": residual,
    }
    if tile.split:
        return constants | {"SHARES": tile.warps}
    # Each group has a sum of its own, and they are added up in order: in one pass.
    planes = min(tile.planes, 2) if grouped else tile.planes
    passes = 4 // planes if tile.passes and not grouped else 1
    return constants | {"BAND": tile.band, "PLANES": planes, "PASSES": passes}


def product(
    x: Float[Array, "M K"] | Int8[Array, "M K"],
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    out_dtype: Any,
    tile: TritonTile,
    gelu: bool = False,
) -> Float[Array, "M N"]:
    """One launch of a kernel.

    Args:
      x: int8 with `token_scale`, or 16-bit; K is four times Kp.
      operands: the scale float32 (N,), or (N, G) with two columns for each block of 256 inputs;
        with `row_sum` codes are decoded, without it signs; u and v of one 16-bit type.
      out_dtype: of the result.
      tile: how the product is cut up.
      gelu: GELU in its tanh form, before the gate.

    Returns:
      (M, N).
    """
    # Optional, and not on every machine that this is checked on.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels import triton_kernels

    m, (n, width) = x.shape[0], packed.shape
    # Triton wants a pointer where there is nothing to read.
    scale = operands.scale
    pointers = [scale if array is None else array for array in operands]
    return jax_triton.triton_call(
        x,
        packed,
        *pointers,
        m,
        width // BLOCK_BYTES,
        kernel=triton_kernels.multiply_few if tile.split else triton_kernels.multiply_many,
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(-(-m // tile.tokens) * -(-n // tile.outputs),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **settings(
            tile,
            n=n,
            width=width,
            exact=x.dtype == jnp.int8,
            codes=operands.row_sum is not None,
            grouped=scale.ndim == 2,
            bias=operands.bias is not None,
            rank=0 if operands.u is None else operands.u.shape[1],
            gelu=gelu,
            gates=0 if operands.gate is None else len(operands.gate),
            residual=operands.residual is not None,
        ),
    )


def ternary_matmul(
    x: Activations,
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    activation_bits: int,
    out_dtype: Any,
    device: Device,
    gelu: bool = False,
    tile: TritonTile | None = None,
) -> Float[Array, "M N"]:
    """As `pallas_kernels.ternary_matmul`, from checked arguments and x (M, K).

    Args:
      device: what the tile is chosen for.
      tile: None takes the table's, or what the rules say.
    """
    (m, k), (n, width), scale = x.shape, packed.shape, operands.scale
    tile = tile or triton_tile(
        Problem(m=m, n=n, k=k, activation_bits=activation_bits, grouped=scale.ndim == 2), device
    )
    if activation_bits == 8 and operands.token_scale is None:
        x, token_scale, row_sum = reference.quantize_activations(x)
        operands = operands._replace(token_scale=token_scale, row_sum=row_sum)
    if k < width * 4:
        # Rows of whole blocks: their ends need no mask, and each begins where wide loads may.
        x = jnp.pad(x, ((0, 0), (0, width * 4 - k)))
    scale = scale.astype(jnp.float32)
    if scale.ndim < 2:
        scale = jnp.broadcast_to(scale.reshape(-1), (n,))
    else:
        scale = jnp.pad(scale, ((0, 0), (0, width // 32 - scale.shape[1])))
        # The sums of its groups are not known.
        operands = operands._replace(row_sum=None)
    if operands.token_scale is not None:
        operands = operands._replace(token_scale=operands.token_scale.astype(jnp.float32))
    operands = operands._replace(scale=scale)
    if operands.u is None or operands.u.dtype.itemsize == 2:
        return product(x, packed, operands, out_dtype=out_dtype, tile=tile, gelu=gelu)
    # XLA multiplies and adds: the kernel takes 16 bits.
    now = operands._replace(gate=None, residual=None, u=None, v=None)
    y = product(x, packed, now, out_dtype=jnp.float32, tile=tile)
    return reference.finished(y, operands, gelu=gelu).astype(out_dtype)
