"""The Triton kernel of `triton_heads`. Imported only where Triton is there.

A program has some heads of one token: their queries, keys and values. A thread holds neighbouring
channels, so both of a pair that is turned are its own.

Names in capitals are constants of a compilation:
    HEADS, WIDTH: heads, and channels of one.
    SOME: heads of a program, a power of two.
    EPS: of the norms.
    GROUP: heads that are written together; all of them where they are not grouped.
"""

# Triton's language is not Python's: what a type checker would say of it is of no use.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import triton.language as tl

from pallas_kernels.triton_kernels import jit


@jit
def turned(x, scale_ptr, cos, sin, SOME: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """(SOME, WIDTH) normalised, scaled and turned; rounded where plain JAX rounds."""
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + EPS)
    normed = (wide * inverse[:, None]).to(x.dtype).to(tl.float32)
    # For every head again: in the layout of x, so that nothing goes through shared memory.
    every = tl.broadcast_to(tl.arange(0, WIDTH)[None, :], (SOME, WIDTH))
    scale = tl.load(scale_ptr + every).to(x.dtype).to(tl.float32)
    normed = (normed * scale).to(x.dtype).to(tl.float32)
    first, second = tl.split(tl.reshape(normed, (SOME, WIDTH // 2, 2)))
    pair = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(pair, (SOME, WIDTH)).to(x.dtype)


@jit
def normalize_and_rotate(
    first_ptr,
    first_q_ptr,
    first_k_ptr,
    second_ptr,
    second_q_ptr,
    second_k_ptr,
    cos_ptr,
    sin_ptr,
    first_length,
    length,
    q_ptr,
    k_ptr,
    v_ptr,
    FIRST_STRIDE: tl.constexpr,
    SECOND_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SOME: tl.constexpr,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """q, k, v (B, length, HEADS, WIDTH) from rows [q | k | v | ...] of two sequences.

    Tokens before `first_length` are the first's, (B, first_length, FIRST_STRIDE), with its scales
    (WIDTH,); the others the second's. Cosines and sines are (length, WIDTH / 2) float32.

    Of fewer heads a group, what is written is (B, length, GROUP, WIDTH) for each group, with room
    for two more of that size behind it.
    """
    token = tl.program_id(0)
    batch = token // length
    at = token - batch * length
    head = tl.program_id(1) * SOME + tl.arange(0, SOME)
    channel = tl.arange(0, WIDTH)
    inside = head[:, None] * WIDTH + channel[None, :]
    # Of whole heads: a mask that is the same along a row keeps loads wide.
    is_there = (head < HEADS)[:, None]
    if at < first_length:
        row_ptr = first_ptr + (batch * first_length + at).to(tl.int64) * FIRST_STRIDE
        q_scale_ptr = first_q_ptr
        k_scale_ptr = first_k_ptr
    else:
        rest = length - first_length
        row_ptr = second_ptr + (batch * rest + at - first_length).to(tl.int64) * SECOND_STRIDE
        q_scale_ptr = second_q_ptr
        k_scale_ptr = second_k_ptr
    q = tl.load(row_ptr + inside, mask=is_there, other=0)
    k = tl.load(row_ptr + HEADS * WIDTH + inside, mask=is_there, other=0)
    v = tl.load(row_ptr + 2 * HEADS * WIDTH + inside, mask=is_there, other=0)
    pair = tl.broadcast_to(tl.arange(0, WIDTH // 2)[None, :], (SOME, WIDTH // 2))
    cos = tl.load(cos_ptr + at * (WIDTH // 2) + pair)
    sin = tl.load(sin_ptr + at * (WIDTH // 2) + pair)
    group = head // GROUP
    row = (group * 3).to(tl.int64) * tl.num_programs(0) + token
    start = row * (GROUP * WIDTH) + (head - group * GROUP) * WIDTH
    written = start[:, None] + channel[None, :]
    tl.store(q_ptr + written, turned(q, q_scale_ptr, cos, sin, SOME, WIDTH, EPS), mask=is_there)
    tl.store(k_ptr + written, turned(k, k_scale_ptr, cos, sin, SOME, WIDTH, EPS), mask=is_there)
    tl.store(v_ptr + written, v, mask=is_there)


@jit
def normalize_and_rotate_grouped(
    first_ptr,
    first_q_ptr,
    first_k_ptr,
    second_ptr,
    second_q_ptr,
    second_k_ptr,
    cos_ptr,
    sin_ptr,
    first_length,
    length,
    qkv_ptr,
    FIRST_STRIDE: tl.constexpr,
    SECOND_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SOME: tl.constexpr,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The same, in one array (HEADS / GROUP, 3, B, length, GROUP, WIDTH)."""
    apart = tl.num_programs(0).to(tl.int64) * (GROUP * WIDTH)
    normalize_and_rotate(
        first_ptr,
        first_q_ptr,
        first_k_ptr,
        second_ptr,
        second_q_ptr,
        second_k_ptr,
        cos_ptr,
        sin_ptr,
        first_length,
        length,
        qkv_ptr,
        qkv_ptr + apart,
        qkv_ptr + 2 * apart,
        FIRST_STRIDE,
        SECOND_STRIDE,
        HEADS,
        WIDTH,
        SOME,
        EPS,
        GROUP,
    )
