"""The Triton kernels themselves. Imported only where Triton is there, by `triton_matmul`.

The weights are the left operand: a packed byte holds one code of each of four planes (see
`packing`), so what a thread has loaded as its part of one plane's operand becomes its part of any
plane's by a shift and a mask. Nothing moves between threads, and no decoded weight is in memory.

What makes a load fast must be known when it is compiled: `N` and `WIDTH` are constants, because
jax-triton tells the compiler nothing about the divisibility of integer arguments, and a row whose
start may be anywhere is read byte by byte.

Names in capitals are constants of a compilation:
    N, WIDTH: outputs, and bytes of a packed row; x has 4 * WIDTH columns.
    OUTPUTS, TOKENS: of a tile.
    EXACT: x is int8; else 16-bit.
    CODES: int8 x is multiplied by the codes 0, 1, 2, and the sum of its row is taken off.
    GROUPED: a scale for each 128 inputs.
    BIAS, RANK, GELU, GATES, RESIDUAL: what the epilogue does; RANK is how many columns the low-rank
    branch has, GATES how many gates there are.
"""

# Triton's language is not Python's: what a type checker would say of it is of no use.
# pyright: basic, reportMissingImports=false, reportAssignmentType=false

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` of the bare function: Triton compiles the source of what it is given.

    A test run wraps every function of the package in a check of its shapes.
    """
    return triton.jit(inspect.unwrap(function))


@jit
def prepare(packed, EXACT: tl.constexpr, CODES: tl.constexpr):
    """Packed bytes, once for all planes: as they are for codes; for signs c becomes (c - 1) mod 4.

    In binary that is 11, 00 or 01. A plane's two bits at the top of an operand, with zeros below,
    are then -64, 0 or 64 as int8, and -2, 0 or 2 in both 16-bit types (the exponent's highest bit
    alone). Sums are too large by that factor, a power of two, which `unscaled` takes off.
    """
    if CODES:
        return packed
    else:
        # Of each two bits, the low one becomes its opposite, the high one "neither was set".
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $1, 1;
            lop3.b32 $0, $1, t, 0xaaaaaaaa, 0x07;
            }""",
            "=r,r",
            [packed],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )


@jit
def unscaled(sums, EXACT: tl.constexpr, CODES: tl.constexpr):
    """Sums of codes or signs, from sums of what `decode` made of them."""
    if CODES:
        return sums
    elif EXACT:
        return sums >> 6
    else:
        return sums * 0.5


@jit
def decode_int8(prepared, plane: tl.constexpr, CODES: tl.constexpr):
    """The int8 codes or signs of a plane, four to a register."""
    if CODES:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t;
            shr.b32 t, $1, {2 * plane};
            and.b32 $0, t, 0x03030303;
            }}""",
            "=r,r",
            [prepared],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t;
            shl.b32 t, $1, {6 - 2 * plane};
            and.b32 $0, t, 0xc0c0c0c0;
            }}""",
            "=r,r",
            [prepared],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@jit
def decode_16(prepared, plane: tl.constexpr):
    """The signs of a plane as the bits of bfloat16 or float16, which agree; two to a register."""
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .b32 t;
        shl.b32 t, $2, {6 - 2 * plane};
        and.b32 t, t, 0xc0c0c0c0;
        prmt.b32 $0, t, 0, 0x1404;
        prmt.b32 $1, t, 0, 0x3424;
        }}""",
        "=r,=r,r",
        [prepared],
        dtype=tl.int16,
        is_pure=True,
        pack=4,
    )


@jit
def decode(prepared, plane: tl.constexpr, dtype: tl.constexpr, CODES: tl.constexpr):
    """One plane of prepared bytes, of any shape, as an operand of `dtype`."""
    if dtype == tl.int8:
        return decode_int8(prepared, plane, CODES)
    else:
        return decode_16(prepared, plane).to(dtype, bitcast=True)


@jit
def decode_planes(
    packed, plane: tl.constexpr, PLANES: tl.constexpr, dtype: tl.constexpr, CODES: tl.constexpr
):
    """PLANES planes from `plane` on, side by side: (OUTPUTS, 64) to (OUTPUTS, PLANES * 64).

    A thread keeps what it has: the compiler finds the layout of `packed` for which joining costs
    nothing.
    """
    rows: tl.constexpr = packed.shape[0]
    if PLANES == 1:
        return decode(packed, plane, dtype, CODES)
    elif PLANES == 2:
        both = tl.join(decode(packed, plane, dtype, CODES), decode(packed, plane + 1, dtype, CODES))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (rows, 128))
    else:
        # Of four axes, the last but one says which of two halves a plane is in.
        even = tl.join(decode(packed, 0, dtype, CODES), decode(packed, 2, dtype, CODES))
        odd = tl.join(decode(packed, 1, dtype, CODES), decode(packed, 3, dtype, CODES))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (rows, 256))


@jit
def add_branch(y, u_ptr, v_ptr, row, column, RANK: tl.constexpr):
    """`y + v @ u.T` of the tile's tokens and outputs, 32 columns at a time."""
    for first in range(0, RANK, 32):
        at = first + tl.arange(0, 32)
        if RANK % 32 == 0:
            v = tl.load(v_ptr + column[:, None] * RANK + at[None, :])
            u = tl.load(u_ptr + row[None, :].to(tl.int64) * RANK + at[:, None])
        else:
            inside = at < RANK
            v = tl.load(v_ptr + column[:, None] * RANK + at[None, :], mask=inside[None, :], other=0)
            u_at = row[None, :].to(tl.int64) * RANK + at[:, None]
            u = tl.load(u_ptr + u_at, mask=inside[:, None], other=0)
        y = tl.dot(v, u, y, out_dtype=tl.float32)
    return y


@jit
def write(
    total,
    token,
    output,
    scale_ptr,
    bias_ptr,
    token_ptr,
    sum_ptr,
    gate_ptr,
    residual_ptr,
    u_ptr,
    v_ptr,
    y_ptr,
    m,
    N: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,
    CODES: tl.constexpr,
    GROUPED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    GELU: tl.constexpr,
    GATES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The epilogue: scales, bias, branch, GELU, gate and residual in float32, rounded once.

    `total` is (OUTPUTS, TOKENS), of the tokens and outputs from `token` and `output` on.
    """
    row = tl.arange(0, TOKENS)
    column = tl.arange(0, OUTPUTS)
    # Past the end, the last one is read again, and not written.
    row_in = token + tl.minimum(row, m - 1 - token)
    column_in = output + tl.minimum(column, N - 1 - output)
    if CODES:
        total = total - tl.load(sum_ptr + row_in)[None, :]
    elif not GROUPED:
        total = unscaled(total, EXACT, CODES)
    y = total.to(tl.float32)
    if not GROUPED:
        y = y * tl.load(scale_ptr + column_in)[:, None]
    if EXACT:
        y = y * tl.load(token_ptr + row_in)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + column_in).to(tl.float32)[:, None]
    if RANK:
        y = add_branch(y, u_ptr, v_ptr, row_in, column_in, RANK)
    if GELU:
        # tanh(u) = 2 sigmoid(2 u) - 1, so half of one plus it is the sigmoid.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if GATES == 1:
        y = y * tl.load(gate_ptr + column_in).to(tl.float32)[:, None]
    if GATES > 1:
        # One for each of equal runs of tokens.
        run = row_in // (m // GATES)
        y = y * tl.load(gate_ptr + run[None, :] * N + column_in[:, None]).to(tl.float32)
    y = tl.trans(y)
    start = token.to(tl.int64) * N + output
    at = row[:, None] * N + column[None, :]
    written = (row < m - token)[:, None] & (column < N - output)[None, :]
    if RESIDUAL:
        y = y + tl.load(residual_ptr + start + at, mask=written, other=0).to(tl.float32)
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=written)


@jit
def multiply_many(
    x_ptr,
    packed_ptr,
    scale_ptr,
    bias_ptr,
    token_ptr,
    sum_ptr,
    gate_ptr,
    residual_ptr,
    u_ptr,
    v_ptr,
    m,
    blocks,
    y_ptr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
    PLANES: tl.constexpr,
    PASSES: tl.constexpr,
    EXACT: tl.constexpr,
    CODES: tl.constexpr,
    GROUPED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    GELU: tl.constexpr,
    GATES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """One tile a program; its warps share the tile out among them.

    Args: x (m, 4 * WIDTH) int8 or 16-bit; packed (N, WIDTH); scale (N,), or (N, WIDTH / 32) if
    GROUPED; bias (N,), token scale (m,), row sum (m,), gate (GATES, N), residual (m, N),
    u (m, RANK) and v (N, RANK), each read only if there is one; y (m, N). Arrays are in C order.
    `blocks` is WIDTH / 64, but no constant: the loop is not to be unrolled.

    BAND: tiles of tokens that are worked through together. PLANES: of one product, 64 inputs each.
    PASSES: how often the inputs are gone through, each time with the next planes of every block;
    1, or 4 / PLANES, which leaves one product in the loop.
    """
    tiles_n: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    tiles_m = tl.cdiv(m, TOKENS)
    program = tl.program_id(0)
    # Neighbours in time share weights and activations in the cache.
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = program - band * BAND * tiles_n
    token = (band * BAND + inside % height) * TOKENS
    output = (inside // height) * OUTPUTS
    # Past the end, the last row is read again, and not written.
    row = tl.minimum(tl.arange(0, TOKENS), m - 1 - token)
    column = tl.minimum(tl.arange(0, OUTPUTS), N - 1 - output)
    # 64-bit where an array starts, 32-bit within the tile: half the registers.
    x_start = x_ptr + token.to(tl.int64) * (4 * WIDTH)
    packed_start = packed_ptr + output.to(tl.int64) * WIDTH
    x_at = row[None, :] * (4 * WIDTH) + tl.arange(0, 64 * PLANES)[:, None]
    packed_at = column[:, None] * WIDTH + tl.arange(0, 64)[None, :]
    kind: tl.constexpr = tl.int32 if EXACT else tl.float32
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32 if GROUPED else kind)
    part = tl.zeros((OUTPUTS, TOKENS), kind)
    for first in tl.static_range(0, 4, 4 // PASSES):
        for block in range(0, blocks):
            packed = tl.load(packed_start + block * 64 + packed_at)
            packed = prepare(packed, EXACT, CODES)
            for plane in tl.static_range(first, first + 4 // PASSES, PLANES):
                x = tl.load(x_start + block * 256 + plane * 64 + x_at)
                code = decode_planes(packed, plane, PLANES, x_ptr.dtype.element_ty, CODES)
                if GROUPED:
                    # A group is two planes.
                    if plane % 2 == 0:
                        part = tl.zeros((OUTPUTS, TOKENS), kind)
                    part = tl.dot(code, x, part, out_dtype=kind)
                    if (plane + PLANES) % 2 == 0:
                        at = (output + column) * (WIDTH // 32) + block * 2 + plane // 2
                        sums = unscaled(part, EXACT, CODES).to(tl.float32)
                        total += sums * tl.load(scale_ptr + at)[:, None]
                else:
                    total = tl.dot(code, x, total, out_dtype=kind)
    write(
        total,
        token,
        output,
        scale_ptr,
        bias_ptr,
        token_ptr,
        sum_ptr,
        gate_ptr,
        residual_ptr,
        u_ptr,
        v_ptr,
        y_ptr,
        m,
        N,
        OUTPUTS,
        TOKENS,
        EXACT,
        CODES,
        GROUPED,
        BIAS,
        RANK,
        GELU,
        GATES,
        RESIDUAL,
    )


@jit
def multiply_few(
    x_ptr,
    packed_ptr,
    scale_ptr,
    bias_ptr,
    token_ptr,
    sum_ptr,
    gate_ptr,
    residual_ptr,
    u_ptr,
    v_ptr,
    m,
    blocks,
    y_ptr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARES: tl.constexpr,
    EXACT: tl.constexpr,
    CODES: tl.constexpr,
    GROUPED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    GELU: tl.constexpr,
    GATES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """One tile a program; its warps, SHARES of them, share the inputs out among them.

    Each takes every SHARES-th block of 256, and their sums are added up in a fixed order. So a tile
    can be small, and reading the weights, which is all that takes time, is up to many programs.
    Arguments as of `multiply_many`.
    """
    tiles_n: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    whole: tl.constexpr = WIDTH // 64 % SHARES == 0
    program = tl.program_id(0)
    token = (program // tiles_n) * TOKENS
    output = (program % tiles_n) * OUTPUTS
    share = tl.arange(0, SHARES)[:, None, None]
    row = tl.arange(0, TOKENS)[None, None, :]
    column = tl.minimum(tl.arange(0, OUTPUTS), N - 1 - output)[None, :, None]
    x_start = x_ptr + token.to(tl.int64) * (4 * WIDTH)
    packed_start = packed_ptr + output.to(tl.int64) * WIDTH
    x_at = share * 256 + row * (4 * WIDTH) + tl.arange(0, 64)[None, :, None]
    packed_at = share * 64 + column * WIDTH + tl.arange(0, 64)[None, None, :]
    kind: tl.constexpr = tl.int32 if EXACT else tl.float32
    total = tl.zeros((SHARES, OUTPUTS, TOKENS), tl.float32 if GROUPED else kind)
    part = tl.zeros((SHARES, OUTPUTS, TOKENS), kind)
    for block in range(0, blocks, SHARES):
        # Rows past the end are not read: the tile would else be read as often as a full one.
        read = row < m - token
        if whole:
            packed = tl.load(packed_start + block * 64 + packed_at)
        else:
            inside = share < blocks - block
            packed = tl.load(packed_start + block * 64 + packed_at, mask=inside, other=0)
            read = read & inside
        packed = prepare(packed, EXACT, CODES)
        for plane in tl.static_range(4):
            x = tl.load(x_start + block * 256 + plane * 64 + x_at, mask=read, other=0)
            code = decode(packed, plane, x_ptr.dtype.element_ty, CODES)
            if GROUPED:
                # A group is two planes.
                if plane % 2 == 0:
                    part = tl.zeros((SHARES, OUTPUTS, TOKENS), kind)
                part = tl.dot(code, x, part, out_dtype=kind)
                if plane % 2 == 1:
                    at = (output + column) * (WIDTH // 32) + (block + share) * 2 + plane // 2
                    if whole:
                        scale = tl.load(scale_ptr + at)
                    else:
                        scale = tl.load(scale_ptr + at, mask=share < blocks - block, other=0)
                    total += unscaled(part, EXACT, CODES).to(tl.float32) * scale
            else:
                total = tl.dot(code, x, total, out_dtype=kind)
    write(
        tl.sum(total, axis=0),
        token,
        output,
        scale_ptr,
        bias_ptr,
        token_ptr,
        sum_ptr,
        gate_ptr,
        residual_ptr,
        u_ptr,
        v_ptr,
        y_ptr,
        m,
        N,
        OUTPUTS,
        TOKENS,
        EXACT,
        CODES,
        GROUPED,
        BIAS,
        RANK,
        GELU,
        GATES,
        RESIDUAL,
    )
