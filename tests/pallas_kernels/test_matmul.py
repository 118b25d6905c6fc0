"""The ternary product against NumPy, in double precision and in exact integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    group_count,
    pack_codes,
    quantize_activations,
    ternary_matmul,
)
from pallas_kernels.api import check_arguments
from pallas_kernels.reference import signed_product

GRANULARITIES = ("tensor", "channel", "group")


def case(granularity="channel", rows=24, columns=300, leading=(2, 5), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (rows, columns), np.uint8)
    shape = {"tensor": (), "channel": (rows,), "group": (rows, group_count(columns))}[granularity]
    scale = rng.uniform(0.01, 0.05, shape).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((*leading, columns)), dtype)
    bias = jnp.asarray(rng.standard_normal(rows), dtype)
    return x, codes, jnp.asarray(scale), bias


def dense(codes, scale):
    """The weight in float64."""
    signs, scale = codes.astype(np.float64) - 1, np.asarray(scale, np.float64)
    if scale.ndim == 2:
        return signs * np.repeat(scale, 128, axis=1)[:, : codes.shape[1]]
    return signs * (scale[:, None] if scale.ndim else scale)


def exact_int8(x, codes, scale, bias):
    """W1.58A8 from the quantised activations, in float64 around exact integer sums."""
    q, token_scale = (np.asarray(a, np.float64) for a in quantize_activations(x))
    return q @ dense(codes, scale).T * token_scale[..., None] + np.asarray(bias, np.float64)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sixteen_bit_activations(granularity):
    x, codes, scale, bias = case(granularity)
    y = ternary_matmul(x, pack_codes(jnp.asarray(codes)), scale, bias)
    expected = np.asarray(x, np.float64) @ dense(codes, scale).T + np.asarray(bias, np.float64)
    # float32 sums of 300 terms of magnitude 0.05.
    np.testing.assert_allclose(np.asarray(y), expected, atol=2e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_int8_activations(granularity):
    x, codes, scale, bias = case(granularity)
    y = ternary_matmul(x, pack_codes(jnp.asarray(codes)), scale, bias, activation_bits=8)
    # Integer sums are exact: only a handful of float32 roundings remain.
    np.testing.assert_allclose(np.asarray(y), exact_int8(x, codes, scale, bias), atol=1e-6)


def test_int8_sums_are_exact_integers():
    """With scale 1 and no bias the result is the int32 sum times the token's scale, to the bit."""
    x, codes, _, _ = case(columns=2048, leading=(7,))
    y = ternary_matmul(x, pack_codes(jnp.asarray(codes)), jnp.float32(1), activation_bits=8)
    q, token_scale = (np.asarray(a) for a in quantize_activations(x))
    sums = q.astype(np.int64) @ (codes.astype(np.int64) - 1).T
    np.testing.assert_array_equal(np.asarray(y), sums.astype(np.float32) * token_scale[:, None])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float_codes_give_the_same_bits_as_int8(granularity):
    """Training multiplies the same integers as floats; bf16 holds them, float32 sums are exact."""
    x, codes, scale, bias = case(granularity, columns=1024)
    q, token_scale = quantize_activations(x)
    signs = jnp.asarray(codes).astype(jnp.int8) - 1
    exact = signed_product(q, signs, scale, bias, token_scale)
    as_floats = (q.astype(jnp.bfloat16), signs.astype(jnp.bfloat16))
    floats = signed_product(*as_floats, scale, bias, token_scale)
    np.testing.assert_array_equal(np.asarray(exact), np.asarray(floats))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_jit_vmap_and_leading_axes_agree(granularity, bits):
    x, codes, scale, bias = case(granularity, dtype=jnp.bfloat16)
    packed = pack_codes(jnp.asarray(codes))

    def product(x):
        return ternary_matmul(x, packed, scale, bias, activation_bits=bits)

    whole = product(x)
    assert whole.shape == (2, 5, 24)
    assert whole.dtype == jnp.bfloat16
    # One rounding to bf16 of float32 sums that differ in their order at most.
    close = {"rtol": 2**-7, "atol": 1e-5}
    for other in (jax.jit(product)(x), jax.vmap(product)(x), product(x.reshape(10, -1))):
        np.testing.assert_allclose(
            np.asarray(other, np.float32).reshape(2, 5, 24), np.asarray(whole, np.float32), **close
        )
    vector = product(x[0, 0])
    np.testing.assert_allclose(
        np.asarray(vector, np.float32), np.asarray(whole[0, 0], np.float32), **close
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients(granularity, bits):
    x, codes, scale, bias = case(granularity)
    packed = pack_codes(jnp.asarray(codes))
    weights = jnp.asarray(np.random.default_rng(9).standard_normal((2, 5, 24)), jnp.float32)

    def loss(x, scale, bias):
        y = ternary_matmul(x, packed, scale, bias, activation_bits=bits)
        return jnp.sum(y * weights)

    dx, dscale, dbias = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, scale, bias)
    g = np.asarray(weights, np.float64).reshape(10, 24)
    np.testing.assert_allclose(
        np.asarray(dx).reshape(10, -1), g @ dense(codes, scale), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(np.asarray(dbias), g.sum(0), rtol=1e-4, atol=1e-5)
    outer = (g.T @ np.asarray(x, np.float64).reshape(10, -1)) * (codes.astype(np.float64) - 1)
    if granularity == "tensor":
        expected = outer.sum()
    elif granularity == "channel":
        expected = outer.sum(1)
    else:
        expected = np.add.reduceat(outer, [0, 128, 256], axis=1)
    np.testing.assert_allclose(np.asarray(dscale), expected, rtol=1e-3, atol=1e-3)


def test_out_dtype():
    x, codes, scale, bias = case(dtype=jnp.bfloat16)
    y = ternary_matmul(x, pack_codes(jnp.asarray(codes)), scale, bias, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32


def test_quantize_activations():
    x = jnp.asarray([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [254.0, 1.0, 3.0]])
    q, scale = quantize_activations(x)
    np.testing.assert_array_equal(np.asarray(q), [[0, 0, 0], [64, -127, 32], [127, 0, 2]])
    np.testing.assert_allclose(np.asarray(scale), [0, 2 / 127, 2], rtol=1e-7)


def test_quantize_activations_keeps_what_is_not_finite():
    x = jnp.asarray([[jnp.inf, 1.0], [jnp.nan, 1.0], [1e-45, 0.0]])
    q, scale = quantize_activations(x)
    assert not np.isfinite(np.asarray(scale[:2])).any()
    assert np.asarray(q[2]).tolist() == [0, 0]
    assert np.isfinite(np.asarray(scale[2]))


def test_quantization_error_is_half_a_step():
    x, *_ = case()
    q, scale = quantize_activations(x)
    error = np.abs(np.asarray(q) * np.asarray(scale)[..., None] - np.asarray(x))
    assert (error <= 0.5 * np.asarray(scale)[..., None] * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "abacus"}, "backend must be None or one of jax, got 'abacus'"),
        ({"activation_bits": 4}, "activation_bits must be 8 or 16, got 4"),
        ({"x": jnp.zeros((2, 300), jnp.int32)}, "x must be floating .* got int32"),
        ({"x": jnp.zeros(())}, r"x must be floating with at least one axis, got float32 of"),
        ({"packed": jnp.zeros((24, 128), jnp.int8)}, "packed must be uint8 .* got int8"),
        ({"x": jnp.zeros((2, 600))}, "packed must have 192 bytes a row for the 600 inputs"),
        ({"scale": jnp.zeros((7,))}, r"scale must have shape \(\) or \(24,\) or \(24, 3\)"),
        ({"scale": jnp.zeros((), jnp.int32)}, "scale must be floating, got int32"),
        ({"bias": jnp.zeros((7,))}, r"bias must have shape \(24,\), got \(7,\)"),
    ],
)
def test_refusals(change, message):
    x, codes, scale, bias = case()
    arguments = {"x": x, "packed": pack_codes(jnp.asarray(codes)), "scale": scale, "bias": bias}
    arguments |= {"activation_bits": 16, "backend": None}
    with pytest.raises(ValueError, match=message):
        check_arguments(**(arguments | change))


def test_the_op_checks_its_arguments():
    x, codes, scale, _ = case()
    with pytest.raises(ValueError, match="backend must be"):
        ternary_matmul(x, pack_codes(jnp.asarray(codes)), scale, backend="abacus")
