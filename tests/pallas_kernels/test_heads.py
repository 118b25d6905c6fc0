"""Queries, keys and values: the op, its plain form against float64, and the kernel on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Projection, attention_heads, grouped_heads
from pallas_kernels import heads as heads_module

EPS = 1e-6


def inputs(lengths, *, heads=3, width=16, batch=2, extra=5, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)

    def scale():
        return jnp.asarray(rng.uniform(0.5, 1.5, width), dtype)

    projections = [
        Projection(
            jnp.asarray(rng.standard_normal((batch, n, 3 * heads * width + extra)), dtype),
            scale(),
            scale(),
        )
        for n in lengths
    ]
    angles = rng.uniform(0, 2 * np.pi, (sum(lengths), width // 2))
    return projections, *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))


def exact(projections, cos, sin, heads):
    """In float64, by complex numbers."""
    width = 2 * cos.shape[1]
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    parts = []
    for projection in projections:
        rows = np.asarray(projection.array, np.float64)[..., : 3 * heads * width]
        q, k, v = np.moveaxis(rows.reshape(*rows.shape[:2], 3, heads, width), 2, 0)
        for x, scale in ((q, projection.q_scale), (k, projection.k_scale)):
            x *= np.asarray(scale, np.float64) / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        parts.append((q, k, v))
    q, k, v = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))

    def turned(x):
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn[:, None]
        return np.stack((pairs.real, pairs.imag), axis=-1).reshape(x.shape)

    return turned(q), turned(k), v


def close(found, wanted, tolerance):
    for got, expected in zip(found, wanted, strict=True):
        got = np.asarray(got, np.float64)
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    heads=st.integers(1, 4),
    width=st.sampled_from((2, 8, 16)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_plain_form_is_the_formula(lengths, heads, width, batch, seed):
    given_ = inputs(lengths, heads=heads, width=width, batch=batch, seed=seed)
    close(attention_heads(*given_, heads=heads), exact(*given_, heads), 2e-6)


def test_sixteen_bits_round_a_few_times():
    given_ = inputs((5, 7), dtype="bfloat16")
    q, k, v = attention_heads(*given_, heads=3, backend="jax")
    assert {q.dtype, k.dtype, v.dtype} == {jnp.dtype("bfloat16")}
    close((q, k, v), exact(*given_, 3), 6e-3)


def test_batches_and_gradients():
    projections, cos, sin = inputs((3, 4))

    def total(array):
        first = projections[0]._replace(array=array)
        q, k, v = attention_heads([first, projections[1]], cos, sin, heads=3)
        return (q * k * v).sum()

    array = projections[0].array
    batch = jnp.stack((array, 2 * array))
    each = jnp.stack([total(one) for one in batch])
    np.testing.assert_allclose(jax.vmap(total)(batch), each, rtol=1e-5)
    along = jnp.asarray(np.random.default_rng(1).standard_normal(array.shape), jnp.float32)
    step = 1e-2
    numeric = (total(array + step * along) - total(array - step * along)) / (2 * step)
    np.testing.assert_allclose((jax.grad(total)(array) * along).sum(), numeric, rtol=2e-2)


def test_groups_are_heads_of_one_device():
    given_ = inputs((3, 4), heads=6)
    q, k, v = attention_heads(*given_, heads=6)
    found = grouped_heads(*given_, heads=6, groups=3)
    assert found.shape == (3, 3, 2, 7, 2, 16)
    for group in range(3):
        for got, whole in zip(found[group], (q, k, v), strict=True):
            np.testing.assert_array_equal(got, whole[:, :, 2 * group : 2 * group + 2])
    for groups in (0, 4):
        with pytest.raises(ValueError, match=f"groups must divide the 6 heads, got {groups}"):
            grouped_heads(*given_, heads=6, groups=groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, c, s: ([], c, s), "expected one or two, got 0"),
        (lambda p, c, s: (p[:1], c, s), "as many tokens as positions, got 3 and 7"),
        (
            lambda p, c, s: ([p[0]._replace(array=p[0].array[..., :100]), p[1]], c, s),
            "projection 0: 3 heads of 16 channels need rows of at least 144, got 100",
        ),
        (
            lambda p, c, s: ([p[0], p[1]._replace(k_scale=jnp.ones(4))], c, s),
            r"projection 1: expected k_scale of \(16,\), got \(4,\)",
        ),
        (
            lambda p, c, s: ([p[0], p[1]._replace(array=p[1].array.astype(jnp.float16))], c, s),
            "projection 1: expected .* of float32, got .* of float16",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention_heads(*change(*inputs((3, 4))), heads=3)


def test_a_backend_is_known_and_can_run():
    given_ = inputs((3, 4))
    with pytest.raises(ValueError, match="must be None, 'triton' or 'jax', got 'mosaic'"):
        attention_heads(*given_, heads=3, backend="mosaic")
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="cannot compute these heads: it needs an NV"):
            attention_heads(*given_, heads=3, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("lengths", "heads", "width"), [((5, 9), 3, 16), ((130,), 24, 128), ((33, 64), 12, 64)]
)
def test_kernel_rounds_where_plain_jax_does(dtype, lengths, heads, width):
    projections, cos, sin = inputs(lengths, heads=heads, width=width, dtype=dtype, extra=32)
    if reason := heads_module.why_not(projections[0].array, cos):
        pytest.skip(reason)

    def run(backend):
        call = jax.jit(lambda p, c, s: attention_heads(p, c, s, heads=heads, backend=backend))
        return call(projections, cos, sin)

    wanted = exact(projections, cos, sin, heads)
    tolerance = 6e-3 if dtype == "bfloat16" else 8e-4
    first, again = run("triton"), run("triton")
    close(first, wanted, tolerance)
    for got, repeated in zip(first, again, strict=True):
        assert jnp.array_equal(got, repeated)
    assert jnp.array_equal(first[2], run("jax")[2])
    for groups in (1, heads // 3, heads):
        call = jax.jit(
            lambda p, c, s, groups=groups: grouped_heads(
                p, c, s, heads=heads, groups=groups, backend="triton"
            )
        )
        together = call(projections, cos, sin)
        assert jnp.array_equal(together, heads_module.grouped(*first, groups))
    # Of what needs a gradient, too.
    grad = jax.grad(
        lambda p: attention_heads(p, cos, sin, heads=heads, backend="triton")[0].sum(),
        allow_int=True,
    )(projections)
    assert jnp.isfinite(grad[0].array.astype(jnp.float32)).all()


@pytest.mark.gpu
def test_scales_of_other_types():
    """Those of one projection in float32, of the other as the tokens: one kernel's pointers."""
    projections, cos, sin = inputs((5, 9), width=64, dtype="bfloat16")
    if reason := heads_module.why_not(projections[0].array, cos):
        pytest.skip(reason)
    wide = projections[0]._replace(q_scale=projections[0].q_scale.astype(jnp.float32))
    found = attention_heads([wide, projections[1]], cos, sin, heads=3, backend="triton")
    wanted = attention_heads(projections, cos, sin, heads=3, backend="triton")
    for one, other in zip(found, wanted, strict=True):
        assert jnp.array_equal(one, other)
