"""What the compiler makes of a function that is traced for a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flux_jax.layers import Linear
from flux_jax.partition import constrain, mesh_in_scope
from flux_jax.sharding import flat_shardings, make_mesh
from flux_jax.tree import split_flat


def results(program, operation):
    """The part before the name, of each such operation of a compiled program."""
    parts = (line.partition(f" {operation}(") for line in program.splitlines())
    return [before for before, found, _ in parts if found]


def test_vectors_come_to_a_weight_that_is_split(capfd):
    """And go back: no weight moves, and the compiler is not at a loss with parts of vectors."""
    width, count = 16, 6
    mesh = make_mesh(data=2, fsdp=4)
    axes = ("mlp", "embed")
    layer = Linear(width, count * width, axes=axes, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rebuild, flat = split_flat(layer)
    x, stream = jnp.ones((8, width)), jnp.ones((8, 3, width))

    def loss(flat, x, scope):
        with mesh_in_scope(scope):
            rows = rebuild(flat)(x).reshape(8, count, width)
            modulated = constrain(stream * rows[:, :1] + rows[:, 1:2], ("batch", None, None))
            return jnp.sum(jnp.sin(modulated))

    step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    placed = {n: jax.device_put(flat[n], place) for n, place in flat_shardings(layer, mesh).items()}
    assert "fsdp" in placed["weight"].sharding.spec[0]
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    compiled = step.lower(placed, jax.device_put(x, batch), mesh).compile()
    assert f"[{count * width},{width}]" not in " ".join(results(compiled.as_text(), "all-gather"))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    found, alone = compiled(placed, jax.device_put(x, batch)), step(flat, x, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, alone)


@pytest.mark.parametrize("axes", [("mlp", "embed"), ("embed", "mlp")])
def test_a_gradient_is_summed_to_where_its_weight_lies(axes):
    """Over `fsdp` first: what goes over `data`, between hosts, is a part."""
    mesh = make_mesh(data=2, fsdp=4)
    layer = Linear(32, 64, axes=axes, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rebuild, flat = split_flat(layer)
    places = flat_shardings(layer, mesh)

    @jax.jit
    def gradient(flat, x):
        def loss(flat):
            with mesh_in_scope(mesh):
                stream = ("batch", None, None)
                y = constrain(rebuild(flat)(constrain(x, stream)), stream)
                return jnp.sum(jnp.sin(y))

        found = jax.grad(loss)(flat)
        return {n: jax.lax.with_sharding_constraint(v, places[n]) for n, v in found.items()}

    x = jnp.ones((8, 3, 32))
    placed = {name: jax.device_put(flat[name], place) for name, place in places.items()}
    program = gradient.lower(placed, x).compile().as_text()
    sums = results(program, "all-reduce")
    assert sum("f32[64,32]" in line for line in sums) == 1
    assert any("f32[16,32]" in line for line in sums)


def test_what_a_caller_may_do_without_us():
    """A mesh of its own in scope, products not traced, or vectors of no batch."""
    layer = Linear(8, 16, axes=("mlp", "embed"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.arange(24.0).reshape(3, 8)
    alone = layer(x)
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(layer(x), alone, rtol=1e-6)

    @jax.jit
    def one_by_one(x):
        with mesh_in_scope(mesh):
            return jax.vmap(layer)(x)

    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_allclose(one_by_one(placed), alone, rtol=1e-6)
