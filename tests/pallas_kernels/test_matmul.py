"""The ternary product against NumPy, in double precision and in exact integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import (
    Columns,
    api,
    group_count,
    mosaic_matmul,
    normalize_and_quantize,
    pack_codes,
    packed_width,
    quantize_activations,
    quantize_columns,
    ternary_matmul,
)
from pallas_kernels.arguments import INT8_INPUTS, check_matmul, check_modulation
from pallas_kernels.reference import float_product, signed_product
from pallas_kernels.tile_table import Device

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
    q, token_scale, _ = (np.asarray(a, np.float64) for a in quantize_activations(x))
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


@pytest.mark.parametrize("bits", [8, 16])
def test_a_low_rank_branch_is_added_before_gelu_and_gate(bits):
    x, codes, scale, bias = case()
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal((2, 5, 6)), rng.standard_normal((24, 6))
    gate, residual = rng.standard_normal(24), rng.standard_normal((2, 5, 24))
    branch, gate32, residual32 = jax.tree.map(jnp.float32, ((u, v), gate, residual))
    y = ternary_matmul(
        *(x, pack_codes(jnp.asarray(codes)), scale, bias),
        activation_bits=bits,
        low_rank=branch,
        gelu=True,
        gate=gate32,
        residual=residual32,
    )
    if bits == 8:
        p = exact_int8(x, codes, scale, bias)
    else:
        p = np.asarray(x, np.float64) @ dense(codes, scale).T + np.asarray(bias, np.float64)
    p = p + u @ v.T
    gelu = p / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (p + 0.044715 * p**3)))
    np.testing.assert_allclose(np.asarray(y), residual + gate * gelu, atol=1e-5)


def test_int8_sums_are_exact_integers():
    """With scale 1 and no bias the result is the int32 sum times the token's scale, to the bit."""
    x, codes, _, _ = case(columns=2048, leading=(7,))
    y = ternary_matmul(x, pack_codes(jnp.asarray(codes)), jnp.float32(1), activation_bits=8)
    q, token_scale, _ = (np.asarray(a) for a in quantize_activations(x))
    sums = q.astype(np.int64) @ (codes.astype(np.int64) - 1).T
    np.testing.assert_array_equal(np.asarray(y), sums.astype(np.float32) * token_scale[:, None])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float_codes_give_the_same_bits_as_int8(granularity):
    """Training multiplies the same integers as floats; bf16 holds them, float32 sums are exact."""
    x, codes, scale, bias = case(granularity, columns=1024)
    q, token_scale, _ = quantize_activations(x)
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
    q, scale, _ = quantize_activations(x)
    np.testing.assert_array_equal(np.asarray(q), [[0, 0, 0], [64, -127, 32], [127, 0, 2]])
    np.testing.assert_allclose(np.asarray(scale), [0, 2 / 127, 2], rtol=1e-7)


def test_quantize_activations_keeps_what_is_not_finite():
    x = jnp.asarray([[jnp.inf, 1.0], [jnp.nan, 1.0], [1e-45, 0.0]])
    q, scale, _ = quantize_activations(x)
    assert not np.isfinite(np.asarray(scale[:2])).any()
    assert np.asarray(q[2]).tolist() == [0, 0]
    assert np.isfinite(np.asarray(scale[2]))


def test_one_nan_in_many_rows_is_kept():
    """XLA vectorises a maximum of so many rows; in a row, one value of many is NaN."""
    x = jnp.ones((32, 512)).at[jnp.arange(0, 32, 2), jnp.arange(0, 512, 32)].set(jnp.nan)
    for quantize in (quantize_activations, jax.jit(quantize_activations)):
        scale = np.asarray(quantize(x).scale)
        assert np.isnan(scale[::2]).all()
        assert np.isfinite(scale[1::2]).all()


def test_quantization_error_is_half_a_step():
    x, *_ = case()
    q, scale, _ = quantize_activations(x)
    error = np.abs(np.asarray(q) * np.asarray(scale)[..., None] - np.asarray(x))
    assert (error <= 0.5 * np.asarray(scale)[..., None] * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"row_sum": jnp.zeros((2, 5), jnp.int32)},
            r"row_sum must be int32 of .* for x of float32",
        ),
        ({"activation_bits": 4}, "activation_bits must be 8 or 16, got 4"),
        ({"leave": -1}, "leave must be a number of multiprocessors, 0 or more, got -1"),
        ({"x": jnp.zeros((2, 300), jnp.int32)}, "x must be floating or int8 .* got int32"),
        ({"x": jnp.zeros(())}, "x must be floating or int8 with at least one axis, got float32 of"),
        ({"packed": jnp.zeros((24, 128), jnp.int8)}, "packed must be uint8 .* got int8"),
        ({"x": jnp.zeros((2, 600))}, "packed must have 192 bytes a row for the 600 inputs"),
        ({"scale": jnp.zeros((7,))}, r"scale must have shape \(\) or \(24,\) or \(24, 3\)"),
        ({"scale": jnp.zeros((), jnp.int32)}, "scale must be floating, got int32"),
        ({"x": jnp.zeros((2, 300), jnp.int8)}, "x of int8 needs activation_bits=8, got 16"),
        (
            {"x": jnp.zeros((2, 300), jnp.int8), "activation_bits": 8},
            "token_scale belongs to x of int8, and x of int8 needs it; got none",
        ),
        ({"token_scale": jnp.zeros(2)}, "token_scale belongs to x of int8.* got one for x of flo"),
        ({"gate": jnp.zeros((7,))}, r"gate must have shape \(24,\) or \(2, 24\), got \(7,\)"),
        ({"gate": jnp.zeros(24, jnp.int32)}, "gate must be floating, got int32"),
        ({"residual": jnp.zeros((10, 24))}, r"residual must have shape \(2, 5, 24\), got \(10, 24"),
        ({"bias": jnp.zeros((7,))}, r"bias must have shape \(24,\), got \(7,\)"),
        (
            {"low_rank": (jnp.zeros((2, 5, 4)), jnp.zeros((24, 3)))},
            r"low_rank must have shapes .* got \(2, 5, 4\) and \(24, 3\)",
        ),
        (
            {"low_rank": (jnp.zeros((2, 5, 4)), jnp.zeros((24, 4), jnp.bfloat16))},
            "low_rank must be of one floating type, got float32 and bfloat16",
        ),
    ],
)
def test_refusals(change, message):
    x, codes, scale, bias = case()
    arguments = {"x": x, "packed": pack_codes(jnp.asarray(codes)), "scale": scale, "bias": bias}
    arguments["activation_bits"] = 16
    with pytest.raises(ValueError, match=message):
        check_matmul(**(arguments | change))


def test_the_ops_check_their_arguments():
    x, codes, scale, _ = case()
    packed = pack_codes(jnp.asarray(codes))
    with pytest.raises(ValueError, match="packed must have 64 bytes a row"):
        ternary_matmul(x[..., :256], packed, scale)
    with pytest.raises(ValueError, match="gain must have shape"):
        normalize_and_quantize(x, scale)


def test_multiprocessors_that_are_left(monkeypatch):
    """By the kernel that shares its tiles out among as many blocks of threads as there are."""
    device, blocks = Device(kind="a card", multiprocessors=40), []

    def seen(x, packed, *_, multiprocessors, out_dtype, **__):
        blocks.append(multiprocessors)
        return jnp.zeros((x.shape[0], packed.shape[0]), out_dtype)

    monkeypatch.setattr(api, "describe", lambda _: device)
    monkeypatch.setattr(api, "choose", lambda *_: "mosaic")
    monkeypatch.setattr(mosaic_matmul, "product", seen)
    x, codes, scale, _ = case(leading=(100,), dtype=jnp.bfloat16)
    for leave in (0, 8, 60):
        ternary_matmul(x, pack_codes(jnp.asarray(codes)), scale, leave=leave)
    assert blocks == [40, 32, 1]
    # Of what has none, there is none to leave.
    assert Device(kind="cpu", multiprocessors=0).without(8).multiprocessors == 0


@pytest.mark.parametrize(
    "op",
    [
        lambda x: ternary_matmul(
            x, jnp.zeros((4, 128), jnp.uint8), jnp.float32(1), backend="abacus"
        ),
        lambda x: quantize_activations(x, backend="abacus"),
        lambda x: quantize_columns([Columns(x, 0, 128)], backend="abacus"),
        lambda x: normalize_and_quantize(x, backend="abacus"),
    ],
    ids=["matmul", "quantize", "columns", "normalize"],
)
def test_an_unknown_backend(op):
    with pytest.raises(ValueError, match="None or one of mosaic, triton, jax, got 'abacus'"):
        op(jnp.zeros((2, 300)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 8), jnp.int8)}, "x must be floating with at least one axis, got int8"),
        ({"x": jnp.zeros((2, 0))}, r"x must have at least one input, got shape \(2, 0\)"),
        ({"gain": jnp.zeros(7)}, r"gain must have shape \(8,\) or \(2, 8\), got \(7,\)"),
        ({"shift": jnp.zeros((1, 8))}, r"shift must have shape \(8,\) or \(2, 8\), got \(1, 8\)"),
        ({"shift": jnp.zeros(8, jnp.int8)}, "shift must be floating, got int8"),
    ],
)
def test_refusals_of_rows(change, message):
    arguments = {"x": jnp.zeros((2, 8)), "gain": None, "shift": None}
    with pytest.raises(ValueError, match=message):
        check_modulation(**(arguments | change))


shapes = st.tuples(st.integers(1, 20), st.integers(1, 600), st.integers(1, 40))


@settings(deadline=None, max_examples=12)
@given(
    shape=shapes,
    bits=st.sampled_from([8, 16]),
    granularity=st.sampled_from(GRANULARITIES),
    size=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_random_shapes_and_scales(shape, bits, granularity, size, seed):
    """Integer sums against int64, everything else against float64."""
    m, k, n = shape
    rng = np.random.default_rng(seed)
    x, codes, scale, bias = case(granularity, n, k, (m,), jnp.float32, seed)
    x = x * jnp.float32(size)
    scale = scale * jnp.float32(rng.choice([1e-3, 1.0, 50.0]))
    packed = pack_codes(jnp.asarray(codes))
    y = np.asarray(ternary_matmul(x, packed, scale, bias, activation_bits=bits))
    if bits == 8:
        want = exact_int8(x, codes, scale, bias)
        q, token_scale, _ = (np.asarray(a, np.float64) for a in quantize_activations(x))
        magnitude = np.abs(q) @ np.abs(dense(codes, scale)).T * token_scale[..., None]
    else:
        want = np.asarray(x, np.float64) @ dense(codes, scale).T + np.asarray(bias, np.float64)
        magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(dense(codes, scale)).T
    bound = 2.0**-20 * (magnitude + np.abs(np.asarray(bias, np.float64)))
    assert (np.abs(y - want) <= bound + 1e-30).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gelu_gate_and_residual(granularity, bits):
    x, codes, scale, bias = case(granularity)
    packed = pack_codes(jnp.asarray(codes))
    rng = np.random.default_rng(3)
    gate = jnp.asarray(rng.standard_normal(24), jnp.float32)
    residual = jnp.asarray(rng.standard_normal((2, 5, 24)), jnp.float32)
    plain = ternary_matmul(x, packed, scale, bias, activation_bits=bits)
    options = {"gelu": True, "gate": gate, "residual": residual}
    y = ternary_matmul(x, packed, scale, bias, activation_bits=bits, **options)
    want = residual + gate.reshape(1, 1, -1) * jax.nn.gelu(plain, approximate=True)
    np.testing.assert_allclose(np.asarray(y), np.asarray(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_gate_for_each_of_a_batch(bits):
    x, codes, scale, bias = case()
    packed = pack_codes(jnp.asarray(codes))
    gate = jnp.asarray(np.random.default_rng(3).standard_normal((2, 24)), jnp.float32)
    options = {"activation_bits": bits}
    y = ternary_matmul(x, packed, scale, bias, gate=gate, **options)
    plain = ternary_matmul(x, packed, scale, bias, **options)
    np.testing.assert_allclose(np.asarray(y), np.asarray(gate[:, None] * plain), rtol=1e-6)


def test_options_are_rounded_once():
    """A sum that bfloat16 cannot hold before the residual takes it back into its range."""
    packed = pack_codes(jnp.full((1, 256), 2, jnp.uint8))
    x = jnp.ones((1, 256), jnp.bfloat16).at[0, 0].set(2)
    residual = jnp.full((1, 1), -256, jnp.bfloat16)
    y = ternary_matmul(x, packed, jnp.float32(1), residual=residual)
    assert y.dtype == jnp.bfloat16
    # 257 would have become 256 or 258.
    assert float(y[0, 0]) == 1.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_activations_that_are_quantised_already(granularity):
    x, codes, scale, bias = case(granularity, dtype=jnp.bfloat16)
    packed = pack_codes(jnp.asarray(codes))
    q, token_scale, _ = quantize_activations(x)
    y = ternary_matmul(q, packed, scale, bias, activation_bits=8, token_scale=token_scale)
    whole = ternary_matmul(x, packed, scale, bias, activation_bits=8)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(whole, np.float32))


def test_gradients_of_quantised_activations():
    """None for the integers; their scale's and the weight's as of the exact product."""
    x, codes, scale, bias = case()
    packed = pack_codes(jnp.asarray(codes))
    q, token_scale, _ = quantize_activations(x)

    def loss(token_scale, scale):
        bits = {"activation_bits": 8, "out_dtype": jnp.float32}
        return ternary_matmul(q, packed, scale, bias, token_scale=token_scale, **bits).sum()

    dtoken, dscale = jax.grad(loss, (0, 1))(token_scale, scale)
    sums = np.asarray(q, np.float64) @ (codes.astype(np.float64) - 1).T
    np.testing.assert_allclose(np.asarray(dtoken), sums @ np.asarray(scale), rtol=1e-4, atol=1e-3)
    want = np.tensordot(np.asarray(token_scale), sums, axes=2)
    np.testing.assert_allclose(np.asarray(dscale), want, rtol=1e-4, atol=1e-3)


def test_nothing_to_multiply():
    packed = pack_codes(jnp.zeros((4, 256), jnp.uint8))
    assert ternary_matmul(jnp.zeros((0, 256)), packed, jnp.float32(1)).shape == (0, 4)
    q, scale, _ = normalize_and_quantize(jnp.zeros((0, 256)))
    assert q.shape == (0, 256)
    assert scale.shape == (0,)


def test_no_images_with_a_vector_each():
    packed = pack_codes(jnp.zeros((4, 256), jnp.uint8))
    x, vectors = jnp.zeros((0, 5, 256)), jnp.zeros((0, 256))
    y = ternary_matmul(x, packed, jnp.float32(1), gate=vectors[:, :4])
    assert y.shape == (0, 5, 4)
    assert normalize_and_quantize(x, vectors, vectors).values.shape == x.shape


@pytest.mark.parametrize("with_vectors", [True, False])
def test_normalize_and_quantize(with_vectors):
    """Within half a step of float64, and the scale of the largest."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(2 + 3 * rng.standard_normal((2, 3, 300)), jnp.bfloat16)
    gain, shift = (jnp.asarray(rng.standard_normal(300), jnp.bfloat16) for _ in range(2))
    vectors = (gain, shift) if with_vectors else (None, None)
    q, scale, _ = normalize_and_quantize(x, *vectors)
    wide = np.asarray(x, np.float64)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    if with_vectors:
        wide = wide * (1 + np.asarray(gain, np.float64)) + np.asarray(shift, np.float64)
    largest = np.abs(wide).max(-1)
    np.testing.assert_allclose(np.asarray(scale), largest / 127, rtol=1e-5)
    assert q.dtype == jnp.int8
    assert np.abs(np.asarray(q) - wide / largest[..., None] * 127).max() <= 0.5 + 1e-3


def test_normalize_and_quantize_with_vectors_for_each_of_a_batch():
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)
    gain, shift = (jnp.asarray(rng.standard_normal((2, 64)), jnp.float32) for _ in range(2))
    together = normalize_and_quantize(x, gain, shift)
    for i in range(2):
        alone = normalize_and_quantize(x[i], gain[i], shift[i])
        for both, one in zip(together, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(both[i]), np.asarray(one))


def test_quantize_columns():
    """Within half a step of float64, GELU where it is asked for, and nothing of the rest."""
    rng = np.random.default_rng(7)
    first, second = (jnp.asarray(rng.standard_normal((2, 3, 60)), jnp.bfloat16) for _ in range(2))
    parts = [Columns(first, 8, 20), Columns(second, 0, 50, gelu=True)]
    q, scale, row_sum = quantize_columns(parts)
    activated = np.asarray(second, np.float64)[..., :50]
    cube = activated + 0.044715 * activated**3
    activated = 0.5 * activated * (1 + np.tanh(np.sqrt(2 / np.pi) * cube))
    wide = np.concatenate([np.asarray(first, np.float64)[..., 8:28], activated], axis=-1)
    largest = np.abs(wide).max(-1)
    np.testing.assert_allclose(np.asarray(scale), largest / 127, rtol=1e-5)
    assert np.abs(np.asarray(q) - wide / largest[..., None] * 127).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(np.asarray(row_sum), np.asarray(q, np.int64).sum(-1))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts must be one or more Columns, got none"),
        ([Columns(jnp.zeros((2, 8)), 4, 5)], "must have columns 4 to 9, got float32 of shape"),
        ([Columns(jnp.zeros((2, 8), jnp.int8), 0, 8)], r"parts\[0\] must be floating, got int8"),
        (
            [Columns(jnp.zeros((2, 8)), 0, 8), Columns(jnp.zeros((3, 8)), 0, 8)],
            r"parts\[1\] must have leading axes \(2,\), got float32 of shape \(3, 8\)",
        ),
    ],
)
def test_columns_that_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        quantize_columns(parts)


def test_normalize_and_quantize_under_vmap():
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((3, 5, 64)), jnp.float32)
    gain = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    q, scale, _ = jax.vmap(normalize_and_quantize)(x, gain)
    for i in range(3):
        want_q, want_scale, _ = normalize_and_quantize(x[i], gain[i])
        np.testing.assert_array_equal(np.asarray(q[i]), np.asarray(want_q))
        np.testing.assert_allclose(np.asarray(scale[i]), np.asarray(want_scale), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_no_inputs_are_refused(bits):
    with pytest.raises(ValueError, match=r"x must have at least one input, got shape \(2, 0\)"):
        ternary_matmul(
            jnp.zeros((2, 0)), jnp.zeros((4, 0), jnp.uint8), jnp.ones(4), activation_bits=bits
        )


def test_what_is_quantised_is_taken_under_64_bit_types():
    with jax.enable_x64(True):
        x = jnp.ones((3, 8), jnp.float32)
        q, scale, row_sum = quantize_activations(x)
        assert row_sum.dtype == jnp.int32
        packed = pack_codes(jnp.full((4, 8), 2, jnp.uint8))
        settings = {"token_scale": scale, "row_sum": row_sum, "activation_bits": 8}
        y = ternary_matmul(q, packed, jnp.ones(4, jnp.float32), **settings)
    np.testing.assert_allclose(y, 8.0, rtol=1e-6)


def test_gradients_in_float16_do_not_vanish():
    """What comes back may be far smaller than float16 goes, where the result is not."""
    x, weight = jnp.full((2, 64), 1.0, jnp.float16), jnp.full((32, 64), 1.0, jnp.float16)
    pull = jax.vjp(float_product, x, weight)[1]
    of_x, of_weight = pull(jnp.full((2, 32), 1e-8, jnp.float32))
    assert of_x.dtype == of_weight.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(of_x, np.float64), 32e-8, rtol=0.1)


def test_sums_that_32_bits_may_not_hold_are_refused():
    k = INT8_INPUTS + 1
    x, packed = jnp.zeros((1, k)), jnp.zeros((1, packed_width(k)), jnp.uint8)
    with pytest.raises(ValueError, match=f"at most {INT8_INPUTS} inputs .* got {k}"):
        ternary_matmul(x, packed, jnp.ones(()), activation_bits=8)
    assert ternary_matmul(x, packed, jnp.ones(()), activation_bits=16).shape == (1, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_rows_that_lie_on_several_devices_stay_there(dtype):
    """Merged, the axes of a mesh would be gathered."""
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, PartitionSpec("data", "sequence", None))
    x = jax.device_put(jnp.ones((2, 4, 128), dtype), place)
    signs, scales = jnp.ones((8, 128), dtype), jnp.ones((2, 4))
    tokens = jax.device_put(scales, NamedSharding(mesh, PartitionSpec("data", "sequence")))
    compiled = jax.jit(signed_product).lower(x, signs, jnp.ones(8), jnp.ones(8), tokens).compile()
    assert "all-gather" not in compiled.as_text()
    y = compiled(x, signs, jnp.ones(8), jnp.ones(8), tokens)
    assert y.sharding.is_equivalent_to(place, y.ndim)
    np.testing.assert_array_equal(np.asarray(y), 129.0)
