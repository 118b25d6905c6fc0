"""What is computed with a ternary product, against one thing after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.inputs import Hidden, Joined, Modulated, dense, gelu, modulate, surround
from flux_jax.layers import Linear
from pallas_kernels import api, mosaic, pack_codes, ternary_matmul
from pallas_kernels.mosaic_api import interpret_params
from pallas_kernels.tile_table import Device
from pallas_kernels.tiles import Tile
from ternary.config import QuantConfig
from ternary.fused import Weights, product
from ternary.layers import FakeTernaryLinear, TernaryLinear

BATCH, LENGTH, WIDTH, OUTPUTS = 2, 6, 128, 64
KINDS = ("plain", "modulated", "hidden", "activated", "joined")


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def stated(kind, dtype=jnp.float32):
    """A statement of activations, and the activations by NumPy-like means."""
    x = draw(BATCH, LENGTH, WIDTH, dtype=dtype)
    wide = draw(BATCH, LENGTH, 3 * WIDTH, seed=1, dtype=dtype)
    shift, scale = (draw(BATCH, WIDTH, seed=s, dtype=dtype) for s in (2, 3))
    if kind == "modulated":
        return Modulated(x, shift, scale), modulate(x, shift, scale)
    if kind == "hidden":
        return Hidden(wide, WIDTH), gelu(wide[..., WIDTH:])
    if kind == "activated":
        return Hidden(wide, WIDTH, activated=True), wide[..., WIDTH:]
    if kind == "joined":
        hidden = gelu(wide[..., 2 * WIDTH :])
        return Joined(x, Hidden(wide, 2 * WIDTH)), jnp.concatenate((x, hidden), axis=-1)
    return x, x


def weights(columns, dtype=jnp.float32):
    rng = np.random.default_rng(7)
    packed = pack_codes(jnp.asarray(rng.integers(0, 3, (OUTPUTS, columns), np.uint8)))
    scale = jnp.asarray(rng.uniform(0.01, 0.05, OUTPUTS), jnp.float32)
    return Weights(packed, scale, draw(OUTPUTS, seed=4, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_statement_is_what_it_says(kind):
    x, want = stated(kind)
    np.testing.assert_array_equal(np.asarray(dense(x)), np.asarray(want))


@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_one_thing_after_the_other(kind, bits, with_gate):
    x, plain = stated(kind)
    given = weights(plain.shape[-1])
    gate, residual = draw(BATCH, OUTPUTS, seed=5), draw(BATCH, LENGTH, OUTPUTS, seed=6)
    around = (gate, residual) if with_gate else (None, None)
    settings = {"activation_bits": bits, "backend": "jax"}
    found = product(x, given, *around, dtype=jnp.float32, **settings)
    y = ternary_matmul(plain, *given, **settings)
    want = surround(y, *around)
    # Rounding to int8 can fall either way where the order of float32 operations differs.
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(want), atol=1e-5 if bits == 16 else 2e-2
    )
    assert np.abs(np.asarray(found) - np.asarray(want)).mean() < 2e-4


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["modulated", "joined"])
def test_gradients_are_those_of_16_bit_activations(kind, bits):
    x, plain = stated(kind)
    given = weights(plain.shape[-1])
    gate, residual = draw(BATCH, OUTPUTS, seed=5), draw(BATCH, LENGTH, OUTPUTS, seed=6)

    def loss(x, gate, residual, function):
        return jnp.sum(jnp.sin(function(x, gate, residual)))

    def fused(x, gate, residual):
        settings = {"activation_bits": bits, "backend": "jax", "dtype": jnp.float32}
        y = product(x, given, gate, residual, **settings)
        # The loss's own gradient must be taken at the same point.
        return y + jax.lax.stop_gradient(after(x, gate, residual) - y)

    def after(x, gate, residual):
        y = ternary_matmul(dense(x), *given, activation_bits=16, backend="jax")
        return surround(y, gate, residual)

    ours, want = (
        jax.jit(jax.grad(functools.partial(loss, function=f), (0, 1, 2)))(x, gate, residual)
        for f in (fused, after)
    )
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(expected)).max() > 0
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["modulated", "joined"])
def test_the_kernels_in_interpret_mode(kind, monkeypatch):
    """Quantising and product as Mosaic kernels, beside plain JAX."""
    x, plain = stated(kind, jnp.bfloat16)
    given = weights(plain.shape[-1], jnp.bfloat16)
    gate = draw(BATCH, OUTPUTS, seed=5, dtype=jnp.bfloat16)
    residual = draw(BATCH, LENGTH, OUTPUTS, seed=6, dtype=jnp.bfloat16)
    settings = {"activation_bits": 8, "dtype": jnp.bfloat16}
    want = product(x, given, gate, residual, backend="jax", **settings)
    tile = Tile(rows=64, tokens=16, store=16, stages=3, code_stages=2)
    interpret = {"interpret": interpret_params()}
    small = {"ternary_matmul": interpret | {"tile": tile}}
    for name in ("ternary_matmul", "quantize", "normalize_and_quantize"):
        kernel = functools.partial(getattr(mosaic, name), **small.get(name, interpret))
        monkeypatch.setattr(mosaic, name, kernel)
    monkeypatch.setattr(api, "choose", lambda *_: "mosaic")
    # A kind of its own: the ops keep what they made for another device.
    device = Device(kind=f"interpreted {kind}", multiprocessors=1)
    monkeypatch.setattr(api, "describe", lambda _: device)
    found = product(x, given, gate, residual, backend="mosaic", **settings)
    difference = np.abs(np.asarray(found, np.float32) - np.asarray(want, np.float32))
    # A step of int8 times a scale, or of bfloat16.
    assert difference.max() < 0.05
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_takes_every_statement(kind):
    """Dense, trained and packed: the same product of the same activations."""
    x, plain = stated(kind)
    gate, residual = draw(BATCH, OUTPUTS, seed=5), draw(BATCH, LENGTH, OUTPUTS, seed=6)
    made = Linear(plain.shape[-1], OUTPUTS, dtype=jnp.float32, rngs=nnx.Rngs(0))
    config = QuantConfig(activation_bits=8, rank=2)
    fake = FakeTernaryLinear.from_linear(made, config)
    frozen = fake.freeze()
    assert isinstance(frozen, TernaryLinear)
    for linear in (made, fake, frozen):
        found = linear(x, gate=gate, residual=residual)
        want = residual + gate[:, None] * linear(plain)
        np.testing.assert_allclose(np.asarray(found), np.asarray(want), atol=1e-5)
        hidden = linear.hidden(x, 16)
        np.testing.assert_allclose(
            np.asarray(hidden.dense()), np.asarray(gelu(linear(plain)[..., 16:])), atol=1e-5
        )


@pytest.mark.parametrize("bits", [8, 16])
def test_hidden_activations_are_those_of_gelu(bits):
    """Whether the product does it or leaves it to the next."""
    made = Linear(WIDTH, OUTPUTS, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = TernaryLinear.from_linear(made, QuantConfig(activation_bits=bits))
    x, _ = stated("modulated")
    whole, part = layer.hidden(x), layer.hidden(x, 16)
    assert whole.activated == (bits == 16)
    assert not part.activated
    want = np.asarray(gelu(layer(x)))
    np.testing.assert_allclose(np.asarray(whole.dense()), want, atol=1e-6)
    np.testing.assert_allclose(np.asarray(part.dense()), want[..., 16:], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(part.array), np.asarray(layer(x)))


def test_gate_and_residual_go_together():
    x, _ = stated("plain")
    with pytest.raises(ValueError, match="gate and residual go together"):
        surround(x, None, x)
