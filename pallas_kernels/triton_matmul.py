"""The ternary product as a Triton kernel: for Ampere and Ada, and anywhere Triton runs.

Triton and jax-triton are imported where they are needed: they are optional, and importing
jax-triton fails on a machine without a GPU plugin of JAX.

One program computes a tile of (outputs, tokens), the weights as the left operand so that their
codes are decoded in the registers that the tensor cores read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels import reference
from pallas_kernels.packing import packed_width
from pallas_kernels.reference import Activations, Scale
from pallas_kernels.tile_table import Device, triton_tile
from pallas_kernels.tiles import Problem, TritonTile


@functools.cache
def kernel() -> Any:
    """The Triton function; made on first use, because its decorator imports Triton.

    Its arguments: x (m, k) int8 or 16-bit; packed (n, width); scale (n,), or (n, width / 32) if
    GROUPED; bias (n,), token scale (m,), gate (GATES, n), residual (m, n), each read only if
    there is one; y (m, n). Arrays are in C order.
    """
    # Optional, and not on every machine that this is checked on.
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def ternary_product(
        x_ptr,
        packed_ptr,
        scale_ptr,
        bias_ptr,
        token_ptr,
        gate_ptr,
        residual_ptr,
        m,
        n,
        k,
        width,
        y_ptr,
        OUTPUTS: tl.constexpr,
        TOKENS: tl.constexpr,
        BAND: tl.constexpr,
        EXACT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        GATES: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        GROUPED: tl.constexpr,
        GELU: tl.constexpr,
    ):
        tiles_n = tl.cdiv(n, OUTPUTS)
        tiles_m = tl.cdiv(m, TOKENS)
        program = tl.program_id(0)
        # Bands of tokens: neighbours in time share weights and activations in the cache.
        band = program // (BAND * tiles_n)
        first = band * BAND
        height = tl.minimum(tiles_m - first, BAND)
        inside = program - band * BAND * tiles_n
        token = (first + inside % height) * TOKENS + tl.arange(0, TOKENS)
        output = (inside // height) * OUTPUTS + tl.arange(0, OUTPUTS)
        # Past the end, the last row is read again, and not written.
        token_in = tl.minimum(token, m - 1)
        output_in = tl.minimum(output, n - 1)
        j = tl.arange(0, 64)
        packed_at = packed_ptr + output_in[:, None].to(tl.int64) * width + j[None, :]
        x_at = x_ptr + token_in[None, :].to(tl.int64) * k + j[:, None]
        if GROUPED or not EXACT:
            total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        else:
            total = tl.zeros((OUTPUTS, TOKENS), tl.int32)
        for block in range(0, width // 64):
            packed = tl.load(packed_at + block * 64)
            for half in tl.static_range(2):
                if GROUPED:
                    if EXACT:
                        part = tl.zeros((OUTPUTS, TOKENS), tl.int32)
                    else:
                        part = tl.zeros((OUTPUTS, TOKENS), tl.float32)
                else:
                    part = total
                for quarter in tl.static_range(2):
                    start = block * 256 + (2 * half + quarter) * 64
                    code = ((packed >> (2 * (2 * half + quarter))) & 3).to(tl.int8) - 1
                    x = tl.load(x_at + start, mask=(start + j < k)[:, None], other=0)
                    if EXACT:
                        part = tl.dot(code.to(tl.int8), x, part, out_dtype=tl.int32)
                    else:
                        part = tl.dot(code.to(x.dtype), x, part, out_dtype=tl.float32)
                if GROUPED:
                    s = tl.load(scale_ptr + output_in * (width // 32) + block * 2 + half)
                    total += part.to(tl.float32) * s[:, None]
                else:
                    total = part
        y = total.to(tl.float32)
        if not GROUPED:
            y = y * tl.load(scale_ptr + output_in)[:, None]
        if EXACT:
            y = y * tl.load(token_ptr + token_in)[None, :]
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + output_in).to(tl.float32)[:, None]
        if GELU:
            # tanh(u) = 2 sigmoid(2 u) - 1, so half of one plus it is the sigmoid.
            y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        if GATES == 1:
            y = y * tl.load(gate_ptr + output_in).to(tl.float32)[:, None]
        if GATES > 1:
            # One for each of equal runs of tokens.
            run = token_in // (m // GATES)
            y = y * tl.load(gate_ptr + run[None, :] * n + output_in[:, None]).to(tl.float32)
        y = tl.trans(y)
        at = token[:, None].to(tl.int64) * n + output[None, :]
        written = (token < m)[:, None] & (output < n)[None, :]
        if HAS_RESIDUAL:
            y = y + tl.load(residual_ptr + at, mask=written, other=0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=written)

    return ternary_product


def product(
    x: Float[Array, "M K"] | Int8[Array, "M K"],
    packed: UInt8[Array, "N Kp"],
    scale: Float[Array, " N"] | Float[Array, "N G"],
    bias: Float[Array, " N"] | None = None,
    token_scale: Float[Array, " M"] | None = None,
    gate: Float[Array, "B N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    out_dtype: Any,
    tile: TritonTile,
    gelu: bool = False,
) -> Float[Array, "M N"]:
    """One launch of `kernel`.

    Args:
      x: int8 with `token_scale`, or 16-bit.
      scale: float32; per group with two columns for each block of 256 inputs.
      out_dtype: of the result.
      tile: how the product is cut up.
      gelu: GELU in its tanh form, before the gate.

    Returns:
      (M, N).
    """
    # Optional, as in `kernel`.
    import jax_triton  # pyright: ignore[reportMissingImports]

    (m, k), (n, width) = x.shape, packed.shape
    # Triton wants a pointer where there is nothing to read.
    others = [scale if v is None else v for v in (bias, token_scale, gate, residual)]
    return jax_triton.triton_call(
        x,
        packed,
        scale,
        *others,
        m,
        n,
        k,
        width,
        kernel=kernel(),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(-(-m // tile.tokens) * -(-n // tile.outputs),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        OUTPUTS=tile.outputs,
        TOKENS=tile.tokens,
        BAND=tile.band,
        EXACT=x.dtype == jnp.int8,
        HAS_BIAS=bias is not None,
        GATES=0 if gate is None else len(gate),
        HAS_RESIDUAL=residual is not None,
        GROUPED=scale.ndim == 2,
        GELU=gelu,
    )


def ternary_matmul(
    x: Activations,
    packed: UInt8[Array, "N Kp"],
    scale: Scale,
    bias: Float[Array, " N"] | None = None,
    token_scale: Float[Array, " M"] | None = None,
    gate: Float[Array, "B N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    row_sum: Int32[Array, " M"] | None = None,
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
    # It would save nothing here: signs are decoded.
    del row_sum
    (m, k), n = x.shape, packed.shape[0]
    tile = tile or triton_tile(Problem(m, n, k, activation_bits, scale.ndim == 2), device)
    if activation_bits == 8 and token_scale is None:
        x, token_scale, _ = reference.quantize_activations(x)
    scale = scale.astype(jnp.float32)
    if scale.ndim < 2:
        scale = jnp.broadcast_to(scale.reshape(-1), (n,))
    else:
        scale = jnp.pad(scale, ((0, 0), (0, packed_width(k) // 32 - scale.shape[1])))
    if token_scale is not None:
        token_scale = token_scale.astype(jnp.float32)
    options: dict[str, Any] = {"out_dtype": out_dtype, "tile": tile, "gelu": gelu}
    return product(x, packed, scale, bias, token_scale, gate, residual, **options)
