"""Base-3 bytes: exact inverses for every shape, and damage found."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_jax.errors import UserError
from pallas_kernels import pack_codes
from ternary.storage import threads
from ternary.storage.base3 import base3_to_packed, base3_width, pack_base3, unpack_base3
from ternary.storage.device_base3 import base3_to_packed_on


def random_codes(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 3, (rows, columns), np.uint8)


@settings(deadline=None, max_examples=150)
@given(rows=st.integers(0, 9), columns=st.integers(0, 1300), seed=st.integers(0, 99))
def test_unpack_inverts_pack(rows, columns, seed):
    codes = random_codes(rows, columns, seed)
    data = pack_base3(codes)
    assert data.shape == (rows, base3_width(columns))
    assert not data.size or data.max() <= 242
    np.testing.assert_array_equal(unpack_base3(data, columns), codes)
    np.testing.assert_array_equal(base3_to_packed(data, columns), pack_codes(codes))


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), block=st.integers(1, 3000))
def test_blocks_and_threads_do_not_show(rows, columns, block):
    codes = random_codes(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "BLOCK", block)
        patch.setattr(threads.os, "cpu_count", lambda: 3)
        data = pack_base3(codes)
        np.testing.assert_array_equal(unpack_base3(data, columns), codes)
        np.testing.assert_array_equal(base3_to_packed(data, columns), pack_codes(codes))
    np.testing.assert_array_equal(data, pack_base3(codes))


def test_bytes_are_as_documented():
    codes = random_codes(3, 23)
    data = pack_base3(codes)
    assert data.shape == (3, 5)
    for n in range(3):
        for i in range(5):
            digits = [int(codes[n, i + 5 * d]) if i + 5 * d < 23 else 1 for d in range(5)]
            assert data[n, i] == sum(digit * 3**d for d, digit in enumerate(digits))


def test_every_byte_is_read_back():
    data = np.arange(243, dtype=np.uint8)[None]
    np.testing.assert_array_equal(pack_base3(unpack_base3(data, 5 * 243)), data)


def on_device(data, in_features, *, what="data"):
    return base3_to_packed_on(jax.devices()[0], data, in_features, what=what)


@pytest.mark.parametrize("columns", [1, 5, 128, 255, 256, 257, 1300])
def test_a_device_decodes_the_same(columns):
    codes = random_codes(7, columns)
    packed = on_device(pack_base3(codes), columns)
    np.testing.assert_array_equal(np.asarray(packed), pack_codes(codes))


def test_a_device_refuses_the_same():
    data = pack_base3(random_codes(3, 40))
    data[1, 2] = 243
    with pytest.raises(UserError, match="tensor `x`: byte 243 at row 1, column 2"):
        on_device(data, 40, what="x")
    with pytest.raises(UserError, match="tensor `x` has 8 bytes a row, expected 20"):
        on_device(data, 100, what="x")


@pytest.mark.parametrize("unpack", [unpack_base3, base3_to_packed])
def test_what_stands_behind_the_last_code_does_not_count(unpack):
    codes = random_codes(2, 21)
    data = pack_base3(codes)
    # Row bytes 1 to 4 have no fifth digit: digit 1 there is 81.
    changed = data.copy()
    changed[:, 1:] -= 81
    np.testing.assert_array_equal(unpack(changed, 21), unpack(data, 21))


@pytest.mark.parametrize("unpack", [unpack_base3, base3_to_packed])
@pytest.mark.parametrize("value", [243, 255])
def test_damaged_bytes_are_found(unpack, value):
    data = pack_base3(random_codes(700, 3000))
    data[650, 77] = value
    message = rf"tensor `blocks.0.qkv`: byte {value} at row 650, column 77 is no five base-3 digits"
    with pytest.raises(UserError, match=message):
        unpack(data, 3000, what="blocks.0.qkv")


@pytest.mark.parametrize("unpack", [unpack_base3, base3_to_packed])
def test_another_width_is_refused(unpack):
    with pytest.raises(UserError, match="tensor `w` has 4 bytes a row, expected 5 for 21 inputs"):
        unpack(np.zeros((2, 4), np.uint8), 21, what="w")
