"""The Mosaic GPU backend: from the op's arguments to its kernels' and back.

Kernels are imported where they are called: they load Pallas.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels import reference
from pallas_kernels.packing import BLOCK_CODES, GROUP, packed_width
from pallas_kernels.reference import Activations, Scale
from pallas_kernels.tile_table import Device, mosaic_tile
from pallas_kernels.tiles import CODE, SIGN, FewTile, Problem, Tile

Quantized = tuple[Int8[Array, "M K"], Float[Array, " M"], Int32[Array, " M"]]


def ternary_matmul(
    x: Activations,
    packed: UInt8[Array, "N Kp"],
    scale: Scale,
    bias: Float[Array, " N"] | None = None,
    token_scale: Float[Array, " M"] | None = None,
    gate: Float[Array, " N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    activation_bits: int,
    out_dtype: Any,
    device: Device,
    gelu: bool = False,
    interpret: Any = None,
    tile: Tile | FewTile | None = None,
) -> Float[Array, "M N"]:
    """As `pallas_kernels.ternary_matmul`, from checked arguments and x (M, K).

    Args:
      device: what the tiles are chosen for.
      interpret: None on a GPU, else the parameters of Pallas' GPU interpret mode.
      tile: None takes the table's, or what the rules say.

    Returns:
      (M, N) of `out_dtype`.
    """
    from pallas_kernels.mosaic_epilogue import Operands
    from pallas_kernels.mosaic_few import product_few
    from pallas_kernels.mosaic_matmul import decodes_to, product

    (m, k), n = x.shape, packed.shape[0]
    grouped = scale.ndim == 2
    tile = tile or mosaic_tile(Problem(m, n, k, activation_bits, grouped), device)
    row_sum = None
    if activation_bits == 8 and token_scale is None:
        x, token_scale, row_sum = quantize(x, device=device, interpret=interpret)
    operands = Operands(
        scale=kernel_scale(scale, n, k),
        bias=bias,
        token_scale=None if token_scale is None else token_scale.astype(jnp.float32),
        gate=gate,
        residual=residual,
    )
    settings = {"out_dtype": jnp.dtype(out_dtype), "gelu": gelu, "interpret": interpret}
    if isinstance(tile, FewTile):
        return product_few(x, packed, operands, tile=tile, **settings)
    if row_sum is None:
        # Summing the activations would be another pass over them.
        tile = dataclasses.replace(tile, decode=SIGN)
    elif decodes_to(tile, x.dtype, grouped) == CODE:
        operands = operands._replace(row_sum=row_sum)
    return product(
        x, packed, operands, tile=tile, multiprocessors=device.multiprocessors, **settings
    )


def quantize(x: Float[Array, "M K"], *, device: Device, interpret: Any = None) -> Quantized:
    """x (M, K) to int8 (M, K), the tokens' scales (M,) and the sums of the int8 (M,)."""
    from pallas_kernels.mosaic_quantize import THREADS, quantize_rows

    if x.shape[1] % THREADS:
        q, scale = reference.quantize_activations(x)
        return q, scale, q.astype(jnp.int32).sum(-1)
    return quantize_rows(x, multiprocessors=device.multiprocessors, interpret=interpret)


def normalize_and_quantize(
    x: Float[Array, "M K"],
    gain: Float[Array, " K"] | None,
    shift: Float[Array, " K"] | None,
    *,
    eps: float,
    device: Device,
    interpret: Any = None,
) -> tuple[Int8[Array, "M K"], Float[Array, " M"]]:
    """As `pallas_kernels.normalize_and_quantize`, from checked arguments and x (M, K)."""
    from pallas_kernels.mosaic_quantize import THREADS, Modulation, quantize_rows

    if x.shape[1] % THREADS:
        return reference.normalize_and_quantize(x, gain, shift, eps)
    norm = Modulation(gain=gain, shift=shift, eps=eps)
    many = device.multiprocessors
    return quantize_rows(x, multiprocessors=many, norm=norm, interpret=interpret)[:2]


def kernel_scale(scale: Scale, n: int, k: int) -> Float[Array, " N"] | Float[Array, "G N"]:
    """Float32 (N,), or (G, N) with G of whole blocks for a scale per group."""
    scale = scale.astype(jnp.float32)
    if scale.ndim < 2:
        return jnp.broadcast_to(scale.reshape(-1), (n,))
    groups = 4 * packed_width(k) // BLOCK_CODES * (BLOCK_CODES // GROUP)
    return jnp.pad(scale.T, ((0, groups - scale.shape[1]), (0, 0)))
