"""vmap and grad around a compute function that knows neither."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import api, mosaic, pack_codes, reference, ternary_matmul
from pallas_kernels.operands import Operands
from pallas_kernels.tile_table import Device

N, K, R = 24, 300, 6


@pytest.fixture
def op(monkeypatch):
    """The op as on the Mosaic backend, with plain JAX in the place of the kernel."""
    shapes = []

    def fake(x, *others, activation_bits, gelu, out_dtype, device):
        shapes.append(x.shape)
        y = reference.ternary_matmul(x, *others, activation_bits=activation_bits, gelu=gelu)
        return y.astype(out_dtype)

    monkeypatch.setattr(mosaic, "ternary_matmul", fake)
    # A device kind of its own: the op keeps what it made for another test.
    device = Device(kind=f"fake {id(shapes)}", multiprocessors=4)

    def product(
        x, packed, scale, bias=None, gate=None, residual=None, u=None, v=None, *, bits=8, gelu=False
    ):
        compute = api._product("mosaic", bits, jnp.dtype(jnp.float32), gelu, device)
        gate = None if gate is None else gate[None]
        operands = Operands(scale, bias, gate=gate, residual=residual, u=u, v=v)
        return compute(x, packed, *operands)

    product.shapes = shapes
    return product


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.standard_normal((3, 5, K)), jnp.float32),
        "packed": pack_codes(jnp.asarray(rng.integers(0, 3, (N, K), np.uint8))),
        "scale": jnp.asarray(rng.uniform(0.1, 0.2, N), jnp.float32),
        "gate": jnp.asarray(rng.standard_normal((3, N)), jnp.float32),
        "residual": jnp.asarray(rng.standard_normal((3, 5, N)), jnp.float32),
        "u": jnp.asarray(rng.standard_normal((3, 5, R)), jnp.float32),
        "v": jnp.asarray(rng.standard_normal((N, R)), jnp.float32),
    }


def test_a_batch_of_activations_becomes_rows(op, arrays):
    packed, scale = arrays["packed"], arrays["scale"]
    y = jax.vmap(lambda x, r: op(x, packed, scale, residual=r))(arrays["x"], arrays["residual"])
    # The last of what is traced is what runs.
    assert op.shapes[-1] == (15, K)
    want = ternary_matmul(
        arrays["x"], packed, scale, residual=arrays["residual"], activation_bits=8, backend="jax"
    )
    np.testing.assert_allclose(np.asarray(y), np.asarray(want), rtol=1e-6, atol=1e-6)


def test_a_batch_of_residuals_alone(op, arrays):
    x, packed, scale = arrays["x"][0], arrays["packed"], arrays["scale"]
    y = jax.vmap(lambda r: op(x, packed, scale, residual=r))(arrays["residual"])
    alone = jnp.stack([op(x, packed, scale, residual=r) for r in arrays["residual"]])
    np.testing.assert_allclose(np.asarray(y), np.asarray(alone), rtol=1e-6, atol=1e-6)


def test_a_batch_of_low_rank_branches(op, arrays):
    packed, scale, v = arrays["packed"], arrays["scale"], arrays["v"]
    y = jax.vmap(lambda x, u: op(x, packed, scale, u=u, v=v))(arrays["x"], arrays["u"])
    assert op.shapes[-1] == (15, K)
    want = ternary_matmul(
        arrays["x"], packed, scale, low_rank=(arrays["u"], v), activation_bits=8, backend="jax"
    )
    np.testing.assert_allclose(np.asarray(y), np.asarray(want), rtol=1e-6, atol=1e-5)
    vs = jnp.stack([v, 2 * v, -v])
    y = jax.vmap(lambda u, v: op(arrays["x"][0], packed, scale, u=u, v=v))(arrays["u"], vs)
    alone = [
        op(arrays["x"][0], packed, scale, u=u, v=v) for u, v in zip(arrays["u"], vs, strict=True)
    ]
    np.testing.assert_allclose(np.asarray(y), np.asarray(jnp.stack(alone)), rtol=1e-6, atol=1e-5)


def test_gradients_of_a_low_rank_branch(op, arrays):
    x, packed, scale, u = arrays["x"][0], arrays["packed"], arrays["scale"], arrays["u"][0]

    def loss(u, v):
        return jnp.sum(op(x, packed, scale, u=u, v=v) ** 2)

    def dense(u, v):
        # As with 16-bit activations, around the result of int8 ones.
        return jnp.sum(2 * jax.lax.stop_gradient(op(x, packed, scale, u=u, v=v)) * (u @ v.T))

    ours = jax.grad(loss, (0, 1))(u, arrays["v"])
    for got, expected in zip(ours, jax.grad(dense, (0, 1))(u, arrays["v"]), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_of_gates_becomes_runs_of_rows(op, arrays, size):
    packed, scale = arrays["packed"], arrays["scale"]
    x, gate = arrays["x"][:size], arrays["gate"][:size]
    y = jax.vmap(lambda x, g: op(x, packed, scale, gate=g))(x, gate)
    alone = jnp.stack([op(v, packed, scale, gate=g) for v, g in zip(x, gate, strict=True)])
    np.testing.assert_allclose(np.asarray(y), np.asarray(alone), rtol=1e-6, atol=1e-6)


def test_vmap_of_vmap(op, arrays):
    packed, scale = arrays["packed"], arrays["scale"]
    y = jax.vmap(jax.vmap(lambda x: op(x[None], packed, scale)[0]))(arrays["x"])
    want = jnp.stack([op(x, packed, scale) for x in arrays["x"]])
    np.testing.assert_allclose(np.asarray(y), np.asarray(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_those_of_16_bit_activations(op, arrays, gelu):
    packed, scale, x = arrays["packed"], arrays["scale"], arrays["x"][0]
    gate, residual = arrays["gate"][0], arrays["residual"][0]
    weights = jnp.cos(jnp.arange(5 * N, dtype=jnp.float32)).reshape(5, N)

    def loss(x, scale, gate, residual):
        return jnp.sum(weights * op(x, packed, scale, None, gate, residual, gelu=gelu))

    def dense(x, scale, gate, residual):
        operands = Operands(scale, gate=gate[None], residual=residual)
        y = reference.ternary_matmul(x, packed, operands, activation_bits=16, gelu=gelu)
        return jnp.sum(weights * y)

    places = (0, 1, 2, 3)
    ours = jax.jit(jax.grad(loss, places))(x, scale, gate, residual)
    want = jax.grad(dense, places)(x, scale, gate, residual)
    for got, expected in zip(ours, want, strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-4, atol=1e-4)


def test_gradients_through_vmap(op, arrays):
    packed, scale = arrays["packed"], arrays["scale"]

    def one(x):
        return op(x, packed, scale).sum()

    inside = jax.vmap(jax.grad(one))(arrays["x"])
    outside = jax.grad(lambda x: jax.vmap(one)(x).sum())(arrays["x"])
    np.testing.assert_allclose(np.asarray(inside), np.asarray(outside), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(op, arrays, check_vma):
    mesh = Mesh(np.asarray(jax.devices()[:3]), ("data",))
    packed, scale = arrays["packed"], arrays["scale"]
    x = arrays["x"].reshape(15, K)
    sharded = jax.shard_map(
        lambda x: op(x, packed, scale),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=check_vma,
    )
    y = jax.jit(sharded)(x)
    want = ternary_matmul(x, packed, scale, activation_bits=8, backend="jax")
    np.testing.assert_allclose(np.asarray(y), np.asarray(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scales", ["channel", "group"])
def test_gradients_under_shard_map(arrays, check_vma, bits, scales):
    """Rows over devices, weights on all: what each finds of a scale's gradient is summed."""
    mesh = Mesh(np.asarray(jax.devices()[:3]), ("data",))
    packed, scale = arrays["packed"], arrays["scale"]
    scale = jnp.stack([scale, 2 * scale, -scale], 1) if scales == "group" else scale
    x, v = arrays["x"].reshape(15, K), arrays["v"]

    def op(x, u, scale, v):
        settings = {"low_rank": (u, v), "activation_bits": bits, "backend": "jax"}
        return jnp.sin(ternary_matmul(x, packed, scale, **settings))

    rows, every = PartitionSpec("data"), PartitionSpec()
    specs = {"in_specs": (rows, rows, every, every), "out_specs": rows}
    sharded = jax.shard_map(op, mesh=mesh, **specs, check_vma=check_vma)
    given = (x, arrays["u"].reshape(15, R), scale, v)
    gradients = [
        jax.jit(jax.grad(lambda *given, f=f: f(*given).sum(), (0, 1, 2, 3)))(*given)
        for f in (sharded, op)
    ]
    for found, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(want), rtol=1e-4, atol=2e-4)


def test_gradients_of_arrays_whose_types_name_a_mesh(arrays):
    """`jax.make_mesh`'s own kind of axes: JAX asks where a sum over a split axis is to go."""
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Explicit,))
    packed, scale, x = arrays["packed"], arrays["scale"], arrays["x"].reshape(15, K)

    def loss(x, scale):
        return jnp.sum(jnp.sin(ternary_matmul(x, packed, scale, backend="jax")))

    want = jax.grad(loss, (0, 1))(x, scale)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None)))
        found = jax.grad(loss, (0, 1))(placed, scale)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-4)
