"""Packed codes to operands of Hopper's tensor cores, in registers.

A thread holds a few bytes of the packed tile, each with the codes of four planes (see `packing`),
and turns them into one plane's operand by a shift and a mask: nothing moves between threads.

There are three ways: to codes (`CODE`), to signs (`SIGN`), and to signs at the top of an operand
(`TOP`), which is as cheap as codes. There, once for all planes, every code c becomes (c - 1) mod 4,
in binary 11, 00 or 01. A plane's two bits at the top, with zeros below, are then -64, 0 or 64 as
int8, and -2, 0 or 2 as bfloat16 (the exponent's highest bit alone). Sums are too large by that
factor, a power of two, which `unscaled` takes off at the end: nothing is rounded by it.

Pallas offers no arithmetic on 8-bit registers, so this is written for the level below it
(`inline_mgpu`), which Pallas' interpret mode does not run. There, `decode_plane` is the same
function in plain JAX: what interpret mode checks is everything around the decoding. The decoding
itself is checked on a GPU, and by a test that runs what is emitted in NumPy.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_api import plgpu
from pallas_kernels.tiles import CODE, SIGN, TOP


def packed_layout(dtype: Any) -> Any:
    """Which thread must hold which packed byte, for operands of `dtype`."""
    return plgpu.Layout.WGMMA_8BIT if dtype == jnp.int8 else plgpu.Layout.WGMMA


def decode_plane(packed: Any, plane: int, dtype: Any, kind: str, native: bool) -> Any:
    """One plane of a packed tile.

    Args:
      packed: (rows, 64) uint8, in `packed_layout(dtype)`.
      plane: 0 to 3.
      dtype: int8 or bfloat16.
      kind: `CODE`, `SIGN` or `TOP`; of bfloat16 one of the last two.
      native: for a GPU, not for interpret mode.

    Returns:
      (rows, 64) of `dtype`, in the same layout; of `TOP` too large, see `unscaled`.
    """
    if not native:
        codes = ((packed >> (2 * plane)) & 3).astype(jnp.int8)
        return (codes if kind == CODE else codes - 1).astype(dtype)

    from jax.experimental.mosaic import gpu as mgpu

    layout = packed_layout(dtype)

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(packed.shape, dtype, layout=layout)
    )
    def decode(_: Any, packed: Any) -> Any:
        decode_all = _int8_words if dtype == jnp.int8 else _bfloat16_words
        words = decode_all(list(packed.registers.flat), plane, kind)
        registers = np.empty(packed.registers.size, object)
        registers[:] = words
        return mgpu.FragmentedArray(
            _registers=registers.reshape(packed.registers.shape),
            _layout=packed.layout,
            _is_signed=True if dtype == jnp.int8 else None,
        )

    # The decorator takes away the first argument, which its types do not say.
    return decode(packed)  # pyright: ignore[reportCallIssue]


def unscaled(sums: Any, kind: str, native: bool) -> Any:
    """Sums of codes or signs, from sums of what `decode_plane` made of them.

    Args:
      sums: int32 or float32.
      kind, native: as for `decode_plane`.
    """
    if kind != TOP or not native:
        return sums
    return sums >> 6 if sums.dtype == jnp.int32 else sums * 0.5


def mlir(*names: str) -> list[Any]:
    """Modules of MLIR's Python bindings, from where JAX itself has them."""
    from jax.experimental.mosaic.gpu import utils

    return [getattr(utils, name) for name in names]


def _constant(value: int) -> Any:
    """A 32-bit word, from its unsigned value."""
    ir, arith = mlir("ir", "arith")
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value - (value >> 31 << 32)))


def sign_word(word: Any) -> Any:
    """Every code c of a 32-bit word as (c - 1) mod 4."""
    arith = mlir("arith")[0]
    # Of each two bits, the low one becomes its opposite, the high one "neither was set".
    either = arith.ori(word, arith.shli(word, _constant(1)))
    ones = _constant(0xFFFFFFFF)
    high = arith.andi(arith.xori(either, ones), _constant(0xAAAAAAAA))
    return arith.ori(high, arith.andi(arith.xori(word, ones), _constant(0x55555555)))


def _int8_words(registers: list[Any], plane: int, kind: str) -> list[Any]:
    """Four packed bytes of each register to four int8."""
    from jax.experimental.mosaic.gpu import utils

    ir, arith = mlir("ir", "arith")
    words = []
    for register in registers:
        word = utils.bitcast(register, ir.IntegerType.get_signless(32))
        if kind == TOP:
            word = top_bits(sign_word(word), 6 - 2 * plane, 0xC0C0C0C0)
        else:
            word = masked(word, 2 * plane, 0x03030303)
        if kind == SIGN:
            # One less in each byte. The top bits, set before and cleared after, keep a byte from
            # borrowing of its neighbour; where it would have borrowed, it becomes 255, which is -1.
            top = _constant(0x80808080)
            word = arith.xori(arith.subi(arith.ori(word, top), _constant(0x01010101)), top)
        words.append(utils.bitcast(word, register.type))
    return words


def top_bits(word: Any, shift: int, mask: int) -> Any:
    """A word shifted to the left, where there is something to shift, and masked."""
    arith = mlir("arith")[0]
    return arith.andi(arith.shli(word, _constant(shift)) if shift else word, _constant(mask))


def masked(word: Any, shift: int, mask: int) -> Any:
    """A word shifted to the right, where there is something to shift, and masked."""
    arith = mlir("arith")[0]
    return arith.andi(arith.shrui(word, _constant(shift)) if shift else word, _constant(mask))


def _bfloat16_words(registers: list[Any], plane: int, kind: str) -> list[Any]:
    """Two packed bytes of each register to two bfloat16."""
    from jax.experimental.mosaic.gpu import utils

    ir, arith, llvm = mlir("ir", "arith", "llvm")
    if kind == CODE:
        raise ValueError(f"bfloat16 operands are signs, got kind={kind!r}")
    i32 = ir.IntegerType.get_signless(32)
    spread = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    words = []
    for first, second in zip(registers[::2], registers[1::2], strict=True):
        # Two registers share one until they are decoded: they are alive through all four planes.
        low, high = (utils.bitcast(arith.extui(spread, r), i32) for r in (first, second))
        both = arith.ori(low, arith.shli(high, _constant(8)))
        if kind == TOP:
            signs = sign_word(both)
            shifts = (14 - 2 * plane, 6 - 2 * plane)
            words += [utils.bitcast(top_bits(signs, shift, 0xC000C000), two) for shift in shifts]
            continue
        for shift in (2 * plane, 2 * plane + 8):
            word = arith.shrui(both, _constant(shift)) if shift else both
            # 128 + code, exactly: bfloat16 has steps of one from 128 to 256. Less 129: the sign.
            word = arith.ori(arith.andi(word, _constant(0x00030003)), _constant(0x43004300))
            operands = [word, _constant(0x43014301)]
            sign: Any = llvm.inline_asm(i32, operands, "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r")
            words.append(utils.bitcast(sign, two))
    return words
