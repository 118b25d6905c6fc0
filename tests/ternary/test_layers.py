"""The ternary linears: the trained one and the packed one agree, and both fit into a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.configs import FluxConfig
from flux_jax.inputs import Hidden, Joined, Modulated, gelu
from flux_jax.layers import Linear
from flux_jax.linears import linears, replace_linears
from flux_jax.lora import LoRALinear
from flux_jax.sequence import EXCHANGE_MULTIPROCESSORS
from flux_jax.tree import split_flat, to_flat
from ternary import layers
from ternary.config import GRANULARITIES, QuantConfig
from ternary.layers import FakeTernaryLinear, PackedCodes, TernaryLinear
from ternary.policy import Policy, select
from tests.random_module import random_module

SMALL = FluxConfig(
    in_channels=16,
    vec_in_dim=24,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)


def linear(columns=300, rows=24, dtype=jnp.float32, bias=True):
    made = Linear(columns, rows, bias=bias, axes=("mlp", "embed"), dtype=dtype, rngs=nnx.Rngs(0))
    if made.bias is not None:
        made.bias[...] = jnp.arange(rows, dtype=dtype) / rows
    return made


def activations(columns=300, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, columns)), dtype)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frozen_equals_trained(granularity, bits, dtype):
    config = QuantConfig(granularity=granularity, activation_bits=bits, refit_steps=1)
    fake = FakeTernaryLinear.from_linear(linear(dtype=dtype), config)
    frozen = fake.freeze()
    x = activations(dtype=dtype)
    trained, packed = np.asarray(fake(x), np.float32), np.asarray(frozen(x), np.float32)
    assert fake(x).dtype == frozen(x).dtype == dtype
    if bits == 8:
        np.testing.assert_array_equal(trained, packed)
    else:
        # Equal operands; a compiler may sum them in another order.
        np.testing.assert_allclose(trained, packed, rtol=2**-7, atol=1e-5)
    dense = x.astype(jnp.float32) @ frozen.dense_weight().T + fake.bias[...][None, None]
    # 8-bit activations are off by 0.5 / 127 of the largest, bf16 by 2^-9.
    np.testing.assert_allclose(packed, np.asarray(dense), atol=0.03)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("stated", ["modulated", "hidden", "joined"])
def test_frozen_equals_trained_whatever_states_the_activations(stated, bits, rank):
    """In bf16: with int8 activations, of integers that were not rounded to bf16 before."""
    config = QuantConfig(activation_bits=bits, rank=rank)
    fake = FakeTernaryLinear.from_linear(linear(dtype=jnp.bfloat16), config)
    frozen = fake.freeze()
    x = activations(dtype=jnp.bfloat16)
    vectors = jax.random.normal(jax.random.key(4), (2, 2, 300), jnp.bfloat16)
    x = {
        "modulated": Modulated(x, *vectors),
        "hidden": Hidden(x),
        "joined": Joined(x[..., :100], Hidden(x, start=100)),
    }[stated]
    gate = jax.random.normal(jax.random.key(5), (2, fake.weight.shape[0]), jnp.bfloat16)
    residual = frozen(x) * 0.5

    @jax.jit
    def both(x, gate, residual):
        around = {"gate": gate, "residual": residual}
        pairs = (fake(x), frozen(x)), (fake(x, **around), frozen(x, **around))
        return jax.tree.map(lambda y: y.astype(jnp.float32), pairs)

    (trained, packed), (around, packed_around) = jax.tree.map(np.asarray, both(x, gate, residual))
    # The compiler may sum a norm in another order, which now and then turns an integer.
    assert np.mean(trained != packed) < (0.02 if bits == 8 else 0.1)
    np.testing.assert_allclose(around, packed_around, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_product_in_two_parts_is_the_product(granularity, bits, rank):
    """Of the packed linear, the trained one, and a dense one."""
    config = QuantConfig(granularity=granularity, activation_bits=bits, rank=rank)
    fake = FakeTernaryLinear.from_linear(linear(), config)
    x = Modulated(activations(), *jnp.full((2, 2, 300), 0.5))
    for layer in (fake, fake.freeze(), linear(), linear(bias=False)):
        first, rest = layer.apart(x, 10)
        # What reads the first takes the first columns, whatever follows them.
        np.testing.assert_allclose(first[..., :10], layer(x)[..., :10], rtol=1e-5, atol=1e-5)
        expected = gelu(layer(x)[..., 10:])
        np.testing.assert_allclose(rest.dense(), expected, rtol=1e-5, atol=1e-5)


def test_the_part_beside_an_exchange_leaves_it_multiprocessors(monkeypatch):
    left, multiply = [], layers.product

    def seen(x, weights, *others, leave, **settings):
        left.append((weights.packed.shape[0], leave))
        return multiply(x, weights, *others, leave=leave, **settings)

    monkeypatch.setattr(layers, "product", seen)
    layer = FakeTernaryLinear.from_linear(linear(), QuantConfig()).freeze()
    layer(activations())
    layer.apart(activations(), 10)
    outputs = layer.packed.shape[0]
    assert sorted(left) == sorted([(outputs, 0), (10, 0), (outputs - 10, EXCHANGE_MULTIPROCESSORS)])


@pytest.mark.parametrize("learned", [True, False])
def test_low_rank_branch(learned):
    dense = linear()
    config = QuantConfig(rank=8, learned_scale=learned)
    fake = FakeTernaryLinear.from_linear(dense, config)
    frozen = fake.freeze()
    x = activations()
    np.testing.assert_allclose(np.asarray(fake(x)), np.asarray(frozen(x)), atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(frozen(x)),
        np.asarray(x @ frozen.dense_weight().T + dense.bias[...][None, None]),
        atol=1e-4,
    )
    plain = TernaryLinear.from_linear(dense, QuantConfig())
    errors = [
        float(jnp.linalg.norm(layer.dense_weight() - dense.weight[...]))
        for layer in (plain, frozen)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_lora_beside_a_branch_of_the_layers_own(bits):
    layer = FakeTernaryLinear.from_linear(linear(), QuantConfig(rank=2, activation_bits=bits))
    rows, columns = layer.weight.shape
    a, b = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, columns), (rows, 3)])
    )
    x = activations()
    for base in (layer, layer.freeze()):
        change = x @ a.T @ b.T
        both = LoRALinear(base, a, b)
        np.testing.assert_allclose(np.asarray(both(x)), np.asarray(base(x) + change), atol=2e-4)
        gate, residual = jnp.cos(jnp.arange(2 * rows)).reshape(2, rows), base(x)
        np.testing.assert_allclose(
            np.asarray(both(x, gate=gate, residual=residual)),
            np.asarray(residual + gate[:, None] * (base(x) + change)),
            atol=4e-4,
        )
        first, hidden = both.apart(x, 4)
        want = base(x) + change
        np.testing.assert_allclose(np.asarray(first)[..., :4], np.asarray(want)[..., :4], atol=2e-4)
        np.testing.assert_allclose(
            np.asarray(hidden.dense()), np.asarray(gelu(want[..., 4:])), atol=4e-4
        )


def test_every_parameter_learns():
    fake = FakeTernaryLinear.from_linear(
        linear(), QuantConfig(rank=2, learned_scale=True, activation_bits=8)
    )
    rebuild, flat = split_flat(fake)
    assert set(flat) == {"weight", "log_scale", "bias", "low_rank_a", "low_rank_b"}

    @jax.jit
    def gradients(flat, x):
        return jax.grad(lambda flat: jnp.sum(jnp.square(rebuild(flat)(x))))(flat)

    for name, grad in gradients(flat, activations()).items():
        assert np.isfinite(np.asarray(grad)).all(), name
        assert np.asarray(grad).any(), name


def test_a_learned_scale_that_vanishes_goes_on_learning():
    fake = FakeTernaryLinear.from_linear(linear(), QuantConfig(learned_scale=True))
    fake.log_scale[...] = jnp.full_like(fake.log_scale[...], -40.0)
    rebuild, flat = split_flat(fake)
    np.testing.assert_array_equal(np.asarray(fake.freeze().scale[...], np.float32), 2.0**-24)
    grads = jax.grad(lambda flat: jnp.sum(jnp.sin(rebuild(flat)(activations()))))(flat)
    assert np.asarray(grads["weight"]).any()
    assert np.asarray(grads["log_scale"]).any()


def test_a_learned_scale_of_zeros_can_be_learned():
    """Its logarithm would be minus infinity, from which no step leads away."""
    dense = linear()
    dense.weight[...] = dense.weight[...].at[3].set(0.0)
    fake = FakeTernaryLinear.from_linear(dense, QuantConfig(learned_scale=True))
    assert np.isfinite(np.asarray(fake.log_scale[...])).all()
    np.testing.assert_array_equal(np.asarray(fake.freeze().dense_weight())[3], 0)


def test_latent_gradient_is_that_of_a_dense_weight():
    """Straight through: `dw = dy.T @ x`, also for weights beyond the scale."""
    fake = FakeTernaryLinear.from_linear(linear(), QuantConfig())
    rebuild, flat = split_flat(fake)
    x = activations()
    g = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 24)), jnp.float32)
    dw = jax.grad(lambda flat: jnp.sum(rebuild(flat)(x) * g))(flat)["weight"]
    expected = jnp.einsum("bln,blk->nk", g, x)
    np.testing.assert_allclose(np.asarray(dw), np.asarray(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_all_products_of_a_step_are_in_16_bits(granularity, rank):
    """Those of the gradient too, or they run at half the rate; and they stay close to float32's."""
    config = QuantConfig(granularity=granularity, rank=rank, learned_scale=True)
    fake = FakeTernaryLinear.from_linear(linear(dtype=jnp.bfloat16), config)
    rebuild, flat = split_flat(fake)
    x = activations(dtype=jnp.bfloat16)
    g = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 24)), jnp.float32)

    def loss(flat, x, dtype):
        module = rebuild(flat)
        module.dtype = jnp.dtype(dtype)
        return jnp.sum(module(x).astype(jnp.float32) * g)

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    program = gradient.lower(flat, x, jnp.bfloat16).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) >= 3
    for line in products:
        assert line.partition("->")[0].count("bf16>") == 2, line
    found, exact = gradient(flat, x, jnp.bfloat16), gradient(flat, x, jnp.float32)

    def close(found, exact):
        found, exact = (np.asarray(a, np.float64) for a in (found, exact))
        assert np.linalg.norm(found - exact) <= 1e-2 * np.linalg.norm(exact)

    jax.tree.map(close, found, exact)


def test_without_bias():
    plain = linear(bias=False)
    frozen = TernaryLinear.from_linear(plain, QuantConfig())
    assert frozen.bias is None
    assert set(to_flat(frozen)) == {"packed", "scale"}


def test_axes_follow_the_weight():
    frozen = TernaryLinear.from_linear(linear(), QuantConfig(granularity="group128", rank=1))
    axes = {name: getattr(frozen, name).get_metadata()["axes"] for name in to_flat(frozen)}
    assert axes == {
        "packed": ("mlp", "embed"),
        "scale": ("mlp", None),
        "bias": ("mlp",),
        "low_rank_a": (None, "embed"),
        "low_rank_b": ("mlp", None),
    }


def test_packed_codes_are_their_own_kind_of_parameter():
    state = nnx.state(TernaryLinear.from_linear(linear(), QuantConfig()))
    _, rest = nnx.split_state(state, PackedCodes, ...)
    assert set(rest) == {"scale", "bias"}


@pytest.mark.parametrize("kind", [TernaryLinear, FakeTernaryLinear])
def test_takes_the_place_of_a_linear_in_the_transformer(kind):
    model = random_module("transformer", SMALL, jnp.bfloat16)
    names = select(list(linears(model)), Policy())
    replace_linears(model, names, lambda name, dense: kind.from_linear(dense, QuantConfig()))
    assert sorted(linears(model, kind)) == sorted(names)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    inputs = (
        draw(2, 4, 16),
        jnp.zeros((4, 3), jnp.int32),
        draw(2, 3, 24),
        jnp.zeros((3, 3), jnp.int32),
        jnp.asarray([0.5, 0.7]),
        draw(2, 24),
        jnp.asarray([3.5, 3.5]),
    )
    graphdef, state = nnx.split(model)
    velocity = jax.jit(lambda state: nnx.merge(graphdef, state)(*inputs))(state)
    assert velocity.shape == (2, 4, 16)
    assert velocity.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(velocity, np.float32)).all()


def test_shapes_without_weights():
    abstract = nnx.eval_shape(lambda: TernaryLinear(3072, 9216, QuantConfig(rank=4)))
    shapes = {name: (value.shape, value.dtype.name) for name, value in to_flat(abstract).items()}
    assert shapes == {
        "packed": ((9216, 768), "uint8"),
        "scale": ((9216,), "float16"),
        "bias": ((9216,), "bfloat16"),
        "low_rank_a": ((4, 3072), "bfloat16"),
        "low_rank_b": ((9216, 4), "bfloat16"),
    }


def test_smallest_scale_is_float16s():
    assert np.float16(layers._SMALLEST) > 0
    assert np.float16(layers._SMALLEST / 2.01) == 0
