"""Students in programs of one's own: a loop with `nnx.Optimizer`, a module of Flax's linears."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flux_jax.errors import UserError
from flux_jax.layers import Linear
from flux_jax.lora import LoRALinear
from ternary import (
    FakeTernaryLinear,
    Policy,
    QuantConfig,
    TernaryLinear,
    freeze_student,
    make_student,
)


class Perceptron(nnx.Module):
    """Two of Flax's linears around one of ours."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(16, 40, rngs=rngs)
        self.middle = Linear(40, 24, dtype=jnp.float32, rngs=rngs)
        self.last = nnx.Linear(24, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.sin(self.middle(jnp.sin(self.first(x)))))


X = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16)), jnp.float32)
POLICY = Policy(include=("first", "middle"))


def copies(module):
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(module))]


def test_training_a_student_leaves_teacher_and_snapshot_alone():
    teacher = Perceptron()
    student = make_student(teacher, QuantConfig(), POLICY)
    assert isinstance(student.first, FakeTernaryLinear)
    snapshot = freeze_student(student)
    before, kept, target = copies(teacher), copies(snapshot), teacher(X)
    optimizer = nnx.Optimizer(student, optax.adamw(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(student, optimizer):
        loss = lambda student: jnp.mean(jnp.square(student(X) - target))  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(student)
        optimizer.update(student, grads)
        return value

    losses = [float(step(student, optimizer)) for _ in range(60)]
    assert losses[-1] < losses[0] / 4
    for now, then in ((teacher, before), (snapshot, kept)):
        for a, b in zip(copies(now), then, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(freeze_student(student)(X), student(X), atol=1e-5)


def test_a_packed_module_trains_what_has_a_gradient():
    frozen = freeze_student(make_student(Perceptron(), QuantConfig(), POLICY))
    assert isinstance(frozen.first, TernaryLinear)
    optimizer = nnx.Optimizer(frozen, optax.sgd(1e-2), wrt=nnx.Param)
    grads = nnx.grad(lambda module: jnp.sum(jnp.square(module(X))))(frozen)
    assert set(grads["first"]) == {"scale", "bias"}
    packed = np.array(frozen.first.packed[...])
    optimizer.update(frozen, grads)
    np.testing.assert_array_equal(np.asarray(frozen.first.packed[...]), packed)


def test_what_cannot_become_a_student():
    frozen = freeze_student(make_student(Perceptron(), QuantConfig(), POLICY))
    with pytest.raises(UserError, match="expected a dense teacher, got one with 2 ternary linears"):
        make_student(frozen, QuantConfig(), POLICY)
    teacher = Perceptron()
    teacher.middle = LoRALinear(teacher.middle, jnp.ones((1, 40)), jnp.ones((24, 1)))
    with pytest.raises(UserError, match="has LoRAs beside its weights: unload them first"):
        make_student(teacher, QuantConfig(), POLICY)
    convolution = nnx.Conv(3, 4, kernel_size=(3,), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"flux_jax.layers.Linear"):
        FakeTernaryLinear.from_linear(convolution, QuantConfig())


@pytest.mark.parametrize("kind", [Linear, FakeTernaryLinear, TernaryLinear])
@pytest.mark.parametrize("leading", [(3,), (3, 5), (3, 2, 5)], ids=str)
def test_gate_and_residual_of_any_rank(kind, leading):
    layer = Linear(16, 24, dtype=jnp.float32, rngs=nnx.Rngs(1))
    layer = layer if kind is Linear else kind.from_linear(layer, QuantConfig())
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*leading, 16)), jnp.float32)
    gate, residual = jnp.cos(jnp.arange(72.0)).reshape(3, 24), jnp.ones((*leading, 24))
    found = layer(x, gate=gate, residual=residual)
    wide = gate.reshape(3, *[1] * (len(leading) - 1), 24)
    np.testing.assert_allclose(found, residual + wide * layer(x), atol=1e-5)
    for one in ({"gate": gate}, {"residual": residual}):
        with pytest.raises(ValueError, match="go together"):
            layer(x, **one)
    with pytest.raises(ValueError, match="expected 16 inputs in the last axis, got 17"):
        layer(jnp.ones((*leading, 17)))
