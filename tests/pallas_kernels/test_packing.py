"""The 2-bit planar layout."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import packing


def random_codes(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 3, (rows, columns), np.uint8)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 5), columns=st.integers(0, 700), seed=st.integers(0, 99))
def test_unpack_inverts_pack(rows, columns, seed):
    codes = random_codes(rows, columns, seed)
    packed = packing.pack_codes(codes)
    assert packed.shape == (rows, packing.packed_width(columns))
    np.testing.assert_array_equal(packing.unpack_codes(packed, columns), codes)


@pytest.mark.parametrize("columns", [1, 100, 256, 300, 513])
def test_jax_and_numpy_agree(columns):
    codes = random_codes(3, columns)
    packed = packing.pack_codes(codes)
    ours = packing.pack_codes(jnp.asarray(codes))
    np.testing.assert_array_equal(np.asarray(ours), packed)
    np.testing.assert_array_equal(np.asarray(packing.unpack_codes(ours, columns)), codes)


def test_bytes_are_as_documented():
    codes = random_codes(2, 600)
    packed = packing.pack_codes(codes)
    assert packed.shape == (2, 192)
    filled = np.full((2, 768), 1, np.uint8)
    filled[:, :600] = codes
    for n in range(2):
        for b in range(3):
            for j in range(64):
                expected = sum(int(filled[n, 256 * b + 64 * p + j]) << 2 * p for p in range(4))
                assert packed[n, 64 * b + j] == expected


def test_one_weight_moves_one_bit_pair():
    codes = np.ones((1, 256), np.uint8)
    assert (packing.pack_codes(codes) == 0b01010101).all()
    codes[0, 64 * 2 + 5] = 2
    packed = packing.pack_codes(codes)
    assert packed[0, 5] == 0b01100101
    assert (np.delete(packed, 5) == 0b01010101).all()


def test_unpack_refuses_another_width():
    with pytest.raises(ValueError, match="packed rows have 128 bytes, expected 64 for 256 inputs"):
        packing.unpack_codes(np.zeros((1, 128), np.uint8), 256)


def test_group_count():
    assert [packing.group_count(k) for k in (1, 128, 129, 3072)] == [1, 1, 2, 24]


@pytest.mark.parametrize("wrong", [np.zeros((2, 8), np.int8), np.zeros(8, np.uint8)], ids=str)
def test_signs_and_vectors_are_no_codes(wrong):
    with pytest.raises(ValueError, match=r"codes must be a uint8 matrix .* got (u?int8) of shape"):
        # Without the types that the tests check.
        inspect.unwrap(packing.pack_codes)(wrong)
