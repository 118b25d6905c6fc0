"""The Mosaic GPU backend: from the op's arguments to its kernels' and back.

Kernels are imported where they are called: they load Pallas.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import reference
from pallas_kernels.operands import Operands
from pallas_kernels.packing import BLOCK_CODES, GROUP, packed_width
from pallas_kernels.reference import Activations, Columns, Quantized, Scale
from pallas_kernels.tile_table import Device, mosaic_tile
from pallas_kernels.tiles import (
    CODE,
    SIGN,
    DirectTile,
    FewTile,
    Problem,
    Tile,
    low_rank_stages,
)


def _in_32_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels count in int32, also where a program has JAX's 64-bit types."""

    @functools.wraps(function)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrow


@_in_32_bits
def ternary_matmul(
    x: Activations,
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    activation_bits: int,
    out_dtype: Any,
    device: Device,
    gelu: bool = False,
    interpret: Any = None,
    tile: Tile | FewTile | DirectTile | None = None,
) -> Float[Array, "M N"]:
    """As `pallas_kernels.ternary_matmul`, from checked arguments and x (M, K).

    Args:
      device: what the tiles are chosen for.
      interpret: None on a GPU, else the parameters of Pallas' GPU interpret mode.
      tile: None takes the table's, or what the rules say.

    Returns:
      (M, N) of `out_dtype`.
    """
    from pallas_kernels.mosaic_direct import product_direct
    from pallas_kernels.mosaic_few import product_few
    from pallas_kernels.mosaic_matmul import decodes_to, product

    (m, k), n = x.shape, packed.shape[0]
    grouped = operands.scale.ndim == 2
    if activation_bits == 8 and operands.token_scale is None:
        whole = [Columns(x, 0, k)]
        x, token_scale, row_sum = quantize(whole, device=device, interpret=interpret)
        operands = operands._replace(token_scale=token_scale, row_sum=row_sum)
    u, gate = operands.u, operands.gate
    run = None if gate is None or len(gate) == 1 else m // len(gate)
    chosen = tile or mosaic_tile(
        Problem(m=m, n=n, k=k, activation_bits=activation_bits, grouped=grouped), device, run=run
    )
    branch = u is not None and not takes_branch(chosen, u, activation_bits)
    # A tile has one gate, and the few rows' kernel reads a residual by pairs of outputs.
    gates = run is not None and run % chosen.tokens
    odd = operands.residual is not None and isinstance(chosen, DirectTile) and n % 2
    if branch or gates or odd:
        # XLA multiplies and adds.
        later = Operands(gate=gate, residual=operands.residual)
        now = operands._replace(gate=None, residual=None)
        if branch:
            later, now = later._replace(u=u, v=operands.v), now._replace(u=None, v=None)
        y = ternary_matmul(
            x,
            packed,
            now,
            activation_bits=activation_bits,
            out_dtype=jnp.float32,
            device=device,
            gelu=gelu and not branch,
            interpret=interpret,
            tile=tile,
        )
        return reference.finished(y, later, gelu=gelu and branch).astype(out_dtype)
    tile, row_sum, token_scale = chosen, operands.row_sum, operands.token_scale
    operands = operands._replace(
        scale=kernel_scale(operands.scale, n, k),
        token_scale=None if token_scale is None else token_scale.astype(jnp.float32),
        row_sum=None,
    )
    settings = {"out_dtype": jnp.dtype(out_dtype), "gelu": gelu, "interpret": interpret}
    if isinstance(tile, DirectTile):
        return product_direct(x, packed, operands, tile=tile, **settings)
    if isinstance(tile, FewTile):
        return product_few(x, packed, operands, tile=tile, **settings)
    if row_sum is None and tile.decode == CODE:
        # Summing the activations would be another pass over them.
        tile = dataclasses.replace(tile, decode=SIGN)
    elif decodes_to(tile, x.dtype, grouped) == CODE:
        operands = operands._replace(row_sum=row_sum)
    return product(
        x, packed, operands, tile=tile, multiprocessors=device.multiprocessors, **settings
    )


def takes_branch(
    tile: Tile | FewTile | DirectTile, u: Float[Array, "M R"], activation_bits: int
) -> bool:
    """Whether the kernel of a tile adds a low-rank branch itself."""
    room = isinstance(tile, Tile) and low_rank_stages(tile, activation_bits)
    return bool(room) and u.dtype == jnp.bfloat16


@_in_32_bits
def quantize(parts: Sequence[Columns], *, device: Device, interpret: Any = None) -> Quantized:
    """As `pallas_kernels.quantize_columns`, from checked parts of arrays (M, W)."""
    from pallas_kernels.mosaic_quantize import THREADS, quantize_rows

    if any(part.size % THREADS for part in parts):
        return reference.quantize_columns(parts)
    return quantize_rows(parts, multiprocessors=device.multiprocessors, interpret=interpret)


@_in_32_bits
def normalize_and_quantize(
    x: Float[Array, "M K"],
    gain: Float[Array, "B K"] | None,
    shift: Float[Array, "B K"] | None,
    *,
    eps: float,
    device: Device,
    interpret: Any = None,
) -> Quantized:
    """As `pallas_kernels.normalize_and_quantize`, from checked arguments and x (M, K)."""
    from pallas_kernels.mosaic_quantize import THREADS, Modulation, quantize_rows

    if x.shape[1] % THREADS:
        return reference.normalize_and_quantize(x, gain, shift, eps)
    norm = Modulation(gain=gain, shift=shift, eps=eps)
    whole, many = [Columns(x, 0, x.shape[1])], device.multiprocessors
    return quantize_rows(whole, multiprocessors=many, norm=norm, interpret=interpret)


def kernel_scale(scale: Scale, n: int, k: int) -> Float[Array, " N"] | Float[Array, "Groups N"]:
    """(N,), or (Groups, N), of whole blocks, for a scale per group; in the scale's own type."""
    if scale.ndim < 2:
        return jnp.broadcast_to(scale.reshape(-1), (n,))
    groups = 4 * packed_width(k) // BLOCK_CODES * (BLOCK_CODES // GROUP)
    return jnp.pad(scale.T, ((0, groups - scale.shape[1]), (0, 0)))
