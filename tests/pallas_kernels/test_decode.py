"""The decoding of codes: that of registers as it is emitted, run in NumPy, and its plain twin."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels import mosaic_decode
from pallas_kernels.mosaic_decode import decode_plane, packed_layout, unscaled
from pallas_kernels.tiles import CODE, SIGN, TOP
from tests.pallas_kernels.emitted import Emitted

# How many times too large they are, at the top of an operand.
FACTORS = {"int8": 64, "bfloat16": 2}
KINDS = [("int8", CODE), ("int8", SIGN), ("int8", TOP), ("bfloat16", SIGN), ("bfloat16", TOP)]
# The least that has a layout.
SHAPE = (64, 64)


def every_byte(columns):
    """(8192, columns): in each place every byte, 32 times, beside any others."""
    each = np.tile(np.repeat(np.arange(256, dtype=np.uint8), 32), (columns, 1))
    return np.random.default_rng(0).permuted(each, axis=1).T


def values(packed, plane, kind):
    """What a plane's codes are as numbers, and where there are any: 3 is no code."""
    codes = packed.astype(np.int32) // 4**plane % 4
    return codes if kind == CODE else codes - 1, codes < 3


def decoder(plane, dtype, kind):
    """What a GPU's thread does with its registers; and how many there are, of how many bytes."""
    layout = packed_layout(dtype).to_mgpu()
    shape, size = layout.registers_shape(SHAPE), layout.vector_length

    def emit(*registers):
        held = np.empty(len(registers), object)
        held[:] = registers
        packed = mgpu.FragmentedArray(
            _registers=held.reshape(shape), _layout=layout, _is_signed=False
        )
        decoded = decode_plane(packed, plane, dtype, kind, native=True)
        assert (decoded.layout, decoded.shape) == (layout, SHAPE)
        assert decoded.is_signed is (True if dtype == jnp.int8 else None)
        return list(decoded.registers.flat)

    count = int(np.prod(shape))
    return Emitted(emit, [f"vector<{size}xi8>"] * count), count, size


@pytest.fixture
def without_a_kernel(monkeypatch):
    """In one, Pallas calls what is decorated, with a context that it lowers in."""

    def inline(**_):
        return lambda decode: functools.partial(decode, None)

    monkeypatch.setattr(mosaic_decode.plgpu, "inline_mgpu", inline)


@pytest.mark.parametrize("plane", range(4))
@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_every_byte_in_every_place_of_the_registers(without_a_kernel, dtype, kind, plane):
    decode, count, size = decoder(plane, jnp.dtype(dtype), kind)
    packed = every_byte(count * size)
    registers = decode(*(np.ascontiguousarray(each) for each in np.split(packed, count, axis=1)))
    found = np.concatenate(registers, axis=1)
    if dtype == "int8":
        found = found.view(np.int8)
    assert found.dtype == dtype
    wanted, written = values(packed, plane, kind)
    factor = FACTORS[dtype] if kind == TOP else 1
    np.testing.assert_array_equal(found.astype(np.float32)[written], factor * wanted[written])


@pytest.mark.parametrize("plane", range(4))
@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_the_plain_twin_knows_no_factor(dtype, kind, plane):
    """Interpret mode decodes signs as they are, whatever the kernel decodes to."""
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    found = decode_plane(jnp.asarray(packed), plane, jnp.dtype(dtype), kind, native=False)
    assert found.dtype == dtype
    wanted, written = values(packed, plane, kind)
    np.testing.assert_array_equal(np.asarray(found, np.float32)[written], wanted[written])
    assert unscaled(found, kind, native=False) is found


def test_sums_are_taken_back_to_scale():
    sums = jnp.asarray([-64 * 5, 0, 64 * 7], jnp.int32)
    np.testing.assert_array_equal(unscaled(sums, TOP, native=True), [-5, 0, 7])
    np.testing.assert_array_equal(unscaled(jnp.float32([-3.0, 5.0]), TOP, native=True), [-1.5, 2.5])
    for kind in (CODE, SIGN):
        assert unscaled(sums, kind, native=True) is sums


def test_bfloat16_operands_are_no_codes():
    with pytest.raises(ValueError, match="bfloat16 operands are signs, got kind='code'"):
        mosaic_decode._bfloat16_words([], 0, CODE)
