"""The choice of a backend, and why one cannot run."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import (
    Columns,
    backends,
    normalize_and_quantize,
    quantize_columns,
    ternary_matmul,
)

BF16, F32 = jnp.bfloat16, jnp.float32


def gpu(capability, kind="a GPU", cores=108):
    return types.SimpleNamespace(
        platform="gpu", device_kind=kind, compute_capability=capability, core_count=cores
    )


CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch):
    monkeypatch.setattr(backends, "missing_triton", lambda: None)


@pytest.mark.parametrize(
    ("device", "x_dtype", "out_dtype", "bits", "expected"),
    [
        (gpu("9.0"), BF16, BF16, 8, "mosaic"),
        (gpu("9.0"), BF16, F32, 16, "mosaic"),
        (gpu("9.0"), F32, BF16, 8, "mosaic"),
        (gpu("9.0"), jnp.int8, BF16, 8, "mosaic"),
        (gpu("9.0"), jnp.float16, BF16, 16, "triton"),
        (gpu("9.0"), F32, F32, 16, "jax"),
        (gpu("8.6"), BF16, BF16, 8, "triton"),
        (gpu("8.9"), BF16, BF16, 16, "triton"),
        (gpu("10.0"), BF16, BF16, 8, "triton"),
        (gpu("9.0", cores=None), BF16, BF16, 8, "triton"),
        (gpu("7.5"), BF16, BF16, 8, "jax"),
        (gpu("gfx942"), BF16, BF16, 8, "jax"),
        (CPU, BF16, BF16, 8, "jax"),
    ],
)
def test_the_first_that_can_run(device, x_dtype, out_dtype, bits, expected):
    assert backends.choose(None, device, x_dtype, jnp.dtype(out_dtype), bits) == expected


@pytest.mark.parametrize(
    ("backend", "device", "x_dtype", "bits", "message"),
    [
        ("mosaic", gpu("9.0", cores=None), BF16, 8, "needs to know how many multiprocessors"),
        ("mosaic", CPU, BF16, 8, "'mosaic' cannot run.*needs an NVIDIA GPU, got the cpu device"),
        ("mosaic", gpu("8.6"), BF16, 8, r"compute capability 9.x \(Hopper\), got 8.6"),
        ("triton", gpu("7.5"), BF16, 8, "compute capability 8.0 or more, got 7.5"),
        ("mosaic", gpu("9.0"), F32, 16, "16-bit activations it needs x of bfloat16, got float32"),
        ("triton", gpu("8.0"), F32, 16, "x of bfloat16 or float16, got float32"),
    ],
)
def test_a_forced_backend_says_why_it_cannot(backend, device, x_dtype, bits, message):
    with pytest.raises(NotImplementedError, match=message):
        backends.choose(backend, device, x_dtype, jnp.dtype(BF16), bits)


def test_results_of_another_type():
    with pytest.raises(NotImplementedError, match="writes bfloat16, float16 or float32, got int32"):
        backends.choose("mosaic", gpu("9.0"), BF16, jnp.dtype(jnp.int32), 8)


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "missing_triton", lambda: "triton cannot be imported (why)")
    with pytest.raises(NotImplementedError, match=r"triton cannot be imported \(why\)"):
        backends.choose("triton", gpu("8.0"), BF16, jnp.dtype(BF16), 8)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: ternary_matmul(x, jnp.zeros((4, 64), jnp.uint8), F32(1), backend="mosaic"),
        lambda x: normalize_and_quantize(x, backend="mosaic"),
    ],
    ids=["ternary_matmul", "normalize_and_quantize"],
)
def test_the_ops_refuse_what_cannot_run_here(op):
    with pytest.raises(NotImplementedError, match="'mosaic' cannot run this product: it needs an"):
        op(jnp.zeros((2, 256), BF16))


def test_an_array_on_several_devices_is_left_to_xla():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    x = jax.device_put(jnp.zeros((4, 8)), NamedSharding(mesh, PartitionSpec("data")))
    assert backends.is_spread(x)
    assert not backends.is_spread(jnp.zeros(3))
    assert not jax.jit(lambda x: jnp.float32(backends.is_spread(x)))(x)


def spread(array):
    """A copy on each of two devices."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: ternary_matmul(x, spread(jnp.zeros((4, 64), jnp.uint8)), jnp.float32(1)),
        lambda x: normalize_and_quantize(x, spread(jnp.zeros(256))),
        lambda x: quantize_columns([Columns(x, 0, 128), Columns(spread(x), 0, 128)]),
    ],
    ids=["weight", "gain", "second part"],
)
def test_other_arguments_on_several_devices_count_too(monkeypatch, op):
    """x lies on one device alone, for which a kernel would be chosen."""
    monkeypatch.setattr(backends, "why_not", lambda *arguments: None)
    assert jax.tree.leaves(op(jnp.zeros((2, 256), BF16)))[0].shape[0] == 2


def test_where_a_traced_array_will_lie(monkeypatch):
    second = jax.devices()[1]
    with jax.default_device(second):
        assert backends.device_of(None) == second
    assert backends.device_of(None) == jax.devices()[0]
    asked = []
    monkeypatch.setattr(jax, "local_devices", lambda backend: asked.append(backend) or [second])
    with jax.default_device("cpu"):
        assert backends.device_of(None) == second
    assert asked == ["cpu"]


def test_what_tiles_are_chosen_for():
    assert backends.describe(gpu("9.0", "NVIDIA H200", 132)).multiprocessors == 132
    assert backends.describe(jax.devices("cpu")[0]).multiprocessors == 0
