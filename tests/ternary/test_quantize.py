"""The quantiser against NumPy in double precision, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.errors import UserError
from ternary.config import GRANULARITIES, scale_shape
from ternary.quantize import (
    dequantize,
    fit_scale,
    low_rank,
    round_scale,
    spread_scale,
    straight_through_signs,
    straight_through_tokens,
    ternary_signs,
)


def weight(rows=16, columns=300, seed=0, dtype=jnp.float32):
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02
    return jnp.asarray(values, dtype)


def fake_quantize(w, scale):
    """What a product with the signs, multiplied by the scale, makes of a weight."""
    return straight_through_signs(w, scale) * spread_scale(scale, w.shape)


def error(w, scale):
    return float(jnp.sum((w - dequantize(ternary_signs(w, scale), scale)) ** 2))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_absolute_mean(granularity):
    w = weight()
    a = np.abs(np.asarray(w, np.float64))
    expected = {
        "tensor": a.mean(),
        "channel": a.mean(axis=1),
        "group128": np.stack([a[:, i : i + 128].mean(axis=1) for i in (0, 128, 256)], axis=1),
    }[granularity]
    scale = fit_scale(w, granularity)
    assert scale.shape == scale_shape(granularity, 16, 300)
    # Rounded to float16.
    np.testing.assert_allclose(np.asarray(scale), expected, rtol=2**-11 + 1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_signs_are_the_clipped_rounding(granularity):
    w = weight()
    scale = fit_scale(w, granularity)
    spread = np.asarray(spread_scale(scale, w.shape), np.float64)
    expected = np.clip(np.round(np.asarray(w, np.float64) / spread), -1, 1)
    np.testing.assert_array_equal(np.asarray(ternary_signs(w, scale)), expected)


def test_halves_go_to_zero():
    w = jnp.asarray([[0.5, -0.5, 0.5000001, -0.5000001, 0.0, 3.0]])
    signs = ternary_signs(w, jnp.float32(1.0))
    assert np.asarray(signs).tolist() == [[0, 0, 1, -1, 0, 1]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_refits_never_make_it_worse(granularity):
    w = weight(seed=3)
    errors = [error(w, fit_scale(w, granularity, steps)) for steps in range(6)]
    # Rounding a scale to float16 moves the error by 1e-7 of it.
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.98 * errors[0]


def test_finer_granularity_is_closer():
    w = weight() * jnp.linspace(0.2, 3.0, 16)[:, None]
    errors = [error(w, fit_scale(w, granularity, 3)) for granularity in GRANULARITIES]
    assert errors[0] > errors[1] > errors[2]


def test_gaussian_weights_end_at_the_known_optimum():
    """The best ternary quantiser of a normal variable: threshold 0.612, level 1.224 (Lloyd-Max)."""
    w = weight(rows=64, columns=4096) / 0.02
    scale = fit_scale(w, "tensor", 20)
    assert float(scale) == pytest.approx(1.224, abs=0.01)
    assert error(w, scale) / w.size == pytest.approx(0.190, abs=0.003)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_of_zero(granularity):
    w = jnp.zeros((4, 200))
    scale = fit_scale(w, granularity, 2)
    assert not np.asarray(scale).any()
    assert not np.asarray(ternary_signs(w, scale)).any()
    assert np.isfinite(np.asarray(jax.grad(lambda w: fake_quantize(w, scale).sum())(w))).all()


@pytest.mark.parametrize("where", ["anywhere", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_scale_is_rounded_as_it_is_stored(where):
    """Compiled too: XLA for a GPU takes a conversion to float16 and back out of a program."""
    assert where in ("anywhere", jax.default_backend())
    scales = np.asarray([0.1, 0.02345, 3e-5, 2.0**-24], np.float32)
    for compute in (round_scale, jax.jit(round_scale)):
        found = np.asarray(compute(jnp.asarray(scales)))
        np.testing.assert_array_equal(found, scales.astype(np.float16).astype(np.float32))
    w = weight()
    scale = np.asarray(fit_scale(w, "channel"))
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert float(jax.grad(lambda s: round_scale(s).sum())(jnp.float32(0.1))) == 1.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_straight_through_gradients(granularity):
    w = weight()
    scale = fit_scale(w, granularity)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(w.shape), jnp.float32)
    dw, ds = jax.grad(lambda w, s: jnp.sum(fake_quantize(w, s) * g), argnums=(0, 1))(w, scale)
    # Clipped weights too have their gradient.
    np.testing.assert_allclose(np.asarray(dw), np.asarray(g), rtol=1e-5)
    by_codes = np.asarray(g, np.float64) * np.asarray(ternary_signs(w, scale))
    expected = {
        "tensor": by_codes.sum(),
        "channel": by_codes.sum(axis=1),
        "group128": np.add.reduceat(by_codes, [0, 128, 256], axis=1),
    }[granularity]
    np.testing.assert_allclose(np.asarray(ds), expected, rtol=1e-3, atol=1e-4)


def test_activation_rounding_passes_gradients():
    def rounded(x):
        q, scale = straight_through_tokens(x)
        return q * jax.lax.stop_gradient(scale)[..., None]

    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50)), jnp.float32)
    y = rounded(x)
    step = np.abs(np.asarray(x)).max(axis=1, keepdims=True) / 127
    error = np.abs(np.asarray(y - x))
    assert (error <= 0.501 * step).all()
    assert error.max() > 0.3 * step.min()
    g = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    dx = jax.grad(lambda x: jnp.sum(rounded(x) * g))(x)
    np.testing.assert_allclose(np.asarray(dx), np.asarray(g), rtol=1e-5)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_low_rank_is_the_truncated_svd(shape):
    residual = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    a, b = low_rank(jnp.asarray(residual), 4)
    assert a.shape == (4, shape[1])
    assert b.shape == (shape[0], 4)
    u, s, v = np.linalg.svd(residual.astype(np.float64))
    best = (u[:, :4] * s[:4]) @ v[:4]
    np.testing.assert_allclose(np.asarray(b @ a), best, atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(a), axis=1), np.linalg.norm(np.asarray(b), axis=0), rtol=1e-3
    )


def test_low_rank_refuses_too_much():
    with pytest.raises(UserError, match=r"rank must be at most 4 beside a weight \(4, 8\), got 5"):
        low_rank(jnp.zeros((4, 8)), 5)
