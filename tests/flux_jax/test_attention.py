"""Attention by every implementation that runs here, against float64, and what is refused."""

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flux_jax import attention_kernels
from flux_jax.attention import (
    IMPLEMENTATIONS,
    attention,
    default_implementation,
    is_fused,
    why_not,
)
from flux_jax.partition import mesh_in_scope
from flux_jax.sharding import make_mesh, partition_spec

# Relative to the largest result: bfloat16 has 8 bits, float8 (e4m3) 4 for q, k, weights and result.
BOUNDS = {"xla": 2e-2, "cudnn": 2e-2, "mosaic": 2e-2, "tokamax": 2e-2}
BOUND_8 = 0.12


def draw(length=96, heads=2, width=64, dtype=jnp.bfloat16, batch=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, length, heads, width)), dtype) for _ in "qkv"]


def exact(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", ["xla", "xla_fp8"])
def test_against_float64(name):
    q, k, v = draw()
    found = attention(q, k, v, implementation=name)
    assert found.dtype == q.dtype
    assert error(found, exact(q, k, v)) <= BOUNDS.get(name, BOUND_8)


def test_eight_bits_are_visible():
    """The twin does round: it is farther from exact than bfloat16, and scales matter to it not."""
    q, k, v = draw()
    want = exact(q, k, v)
    eight = attention(q, k, v, implementation="xla_fp8")
    assert error(eight, want) > 3 * error(attention(q, k, v, implementation="xla"), want)
    shrunk = attention(q, k, v * 2.0**-20, implementation="xla_fp8")
    np.testing.assert_array_equal(
        np.asarray(shrunk, np.float32) * 2.0**20, np.asarray(eight, np.float32)
    )


@pytest.mark.parametrize("name", ["xla", "xla_fp8"])
def test_chunks_of_queries_change_nothing(name, monkeypatch):
    q, k, v = draw(length=50)
    whole = attention(q, k, v, implementation=name)
    monkeypatch.setattr("flux_jax.attention._MAX_SCORES", 50 * 50 * 2 * 2 // 3)
    parts = attention(q, k, v, implementation=name)
    # Sums in another order; rarely, one falls to the next bfloat16, or to the next float8.
    assert (np.asarray(parts) != np.asarray(whole)).mean() < 0.05
    assert error(parts, np.asarray(whole, np.float64)) < BOUND_8 / 2


def test_float8_holds_the_largest_and_zeros():
    x = jnp.asarray([[[[-3.0, 0.0, 1.5, 3.0]]]])
    values, scale = attention_kernels.to_float8(x)
    assert float(values.astype(jnp.float32).max()) == 448.0
    np.testing.assert_allclose(np.asarray(values, np.float32) * scale, np.asarray(x), rtol=2**-4)
    values, _ = attention_kernels.to_float8(jnp.zeros((1, 1, 1, 4)))
    assert not np.asarray(values, np.float32).any()


@pytest.mark.parametrize("name", ["cudnn", "mosaic", "tokamax", "cudnn_fp8"])
def test_kernels_are_refused_without_a_gpu(name):
    q, k, v = draw()
    with pytest.raises(NotImplementedError, match=f"{name}.* cannot run here: it needs an NVIDIA"):
        attention(q, k, v, implementation=name)


def test_an_unknown_name_is_refused():
    q, k, _ = draw()
    assert (why_not("flash", q, k, masked=False) or "").startswith(
        "it must be one of cudnn, mosaic"
    )


def test_masks_are_refused():
    q, k, v = draw()
    with pytest.raises(NotImplementedError, match="neither a bias nor a causal mask"):
        attention(q, k, v, causal=True, implementation="xla_fp8")


class Card(NamedTuple):
    platform: str
    compute_capability: str
    device_kind: str = "a card"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (Card("gpu", "8.6"), "cudnn"),
        (Card("gpu", "9.0"), "cudnn"),
        # Turing, and AMD's.
        (Card("gpu", "7.5"), "xla"),
        (Card("gpu", "gfx942"), "xla"),
        (Card("cpu", ""), "xla"),
    ],
)
def test_the_default_is_one_that_the_device_has(card, expected, monkeypatch):
    monkeypatch.setattr(attention_kernels, "device_of", lambda _: card)
    assert default_implementation(draw(length=8)[0]) == expected


def test_the_default_is_of_the_device_that_the_queries_lie_on(monkeypatch):
    q = draw(length=8)[0]
    cards = {id(q): Card("cpu", "")}
    monkeypatch.setattr(attention_kernels, "device_of", lambda x: cards[id(x)])
    assert default_implementation(q) == "xla"


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("cudnn", (1, 256, 2, 128), "float32", "needs bfloat16 or float16, got float32"),
        ("mosaic", (1, 256, 2, 32), "bfloat16", "multiple of 64, at most 128; got 32"),
        ("mosaic", (1, 200, 2, 64), "bfloat16", "queries in multiples of 128 .* got 200 and 200"),
        ("cudnn_fp8", (1, 256, 2, 8), "bfloat16", "multiple of 16, at most 128; got 8"),
        ("tokamax", (1, 256, 2, 64), "bfloat16", "tokamax cannot be imported"),
        ("cudnn_fp8", (1, 256, 2, 64), "bfloat16", None),
    ],
)
def test_what_a_kernel_needs(name, shape, dtype, message, monkeypatch):
    monkeypatch.setattr(attention_kernels, "device_of", lambda _: Card("gpu", "9.0"))
    # Not to be found, whether or not it is installed.
    monkeypatch.setitem(sys.modules, "tokamax", None)
    q = jax.ShapeDtypeStruct(shape, dtype)
    reason = why_not(name, q, q, masked=False)
    if message is None:
        assert reason is None
    else:
        import re

        assert reason is not None
        assert re.search(message, reason), reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_on_a_gpu(name):
    q, k, v = draw(length=512, heads=24, width=128, batch=1)
    if reason := why_not(name, q, k, masked=False):
        pytest.skip(f"{name}: {reason}")
    found = attention(q, k, v, implementation=name)
    assert error(found, exact(q, k, v)) <= BOUNDS.get(name, BOUND_8)
    twice = attention(q, k, v, implementation=name)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(twice, np.float32))


@pytest.mark.parametrize(("batch", "heads"), [(4, 2), (3, 2), (4, 3)])
def test_a_kernel_on_a_mesh_has_its_devices_images_and_heads(batch, heads, monkeypatch):
    """Split or, where a number does not divide, not: the same result and gradients."""
    shapes = []

    def kernel(q, k, v, scale):
        shapes.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="xla")

    monkeypatch.setitem(attention_kernels.KERNELS, "mosaic", kernel)
    monkeypatch.setattr("flux_jax.attention.why_not", lambda *_, **__: None)
    q, k, v = draw(heads=heads, dtype=jnp.float32, batch=batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    place = NamedSharding(mesh, partition_spec(q.shape, ("batch", None, "heads", None), mesh))

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, implementation="mosaic")))

    @jax.jit
    def split(*arrays):
        with mesh_in_scope(mesh):
            return jax.value_and_grad(loss, (0, 1, 2))(*arrays)

    arrays = jax.device_put((q, k, v), place)
    alone = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), split(*arrays), alone)
    compiled = split.lower(*arrays).compile().as_text()
    assert "all-gather" not in compiled
    part = place.shard_shape(q.shape)
    assert part != q.shape
    assert part in shapes


def pretend_cudnn(monkeypatch):
    """Lets programs that call it be lowered where it is not."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr("flux_jax.attention.why_not", lambda *_, **__: None)


@pytest.mark.parametrize("meshed", [False, True])
def test_a_recomputed_block_keeps_cudnns_attention(meshed, monkeypatch):
    pretend_cudnn(monkeypatch)
    q, k, v = draw(batch=4)
    mesh = make_mesh(data=2, tensor=2) if meshed else None

    def program(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def block(q, k, v):
            return jnp.sin(attention(jnp.sin(q), k, v, implementation="cudnn"))

        def loss(q, k, v):
            with mesh_in_scope(mesh):
                return jnp.sum(block(q, k, v).astype(jnp.float32))

        return str(jax.make_jaxpr(jax.grad(loss))(q, k, v))

    assert program(is_fused).count("dot_product_attention_fwd_wrapper[") == 1
    assert program(None).count("dot_product_attention_fwd_wrapper[") == 2


def test_cudnn_on_a_mesh_is_the_same_program_in_every_process(monkeypatch):
    """Left to XLA, it would be split by a Python function, whose address is in the program."""
    pretend_cudnn(monkeypatch)
    q, k, v = draw(batch=4)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def program(scope):
        def loss(q, k, v):
            with mesh_in_scope(scope):
                return jnp.sum(attention(q, k, v, implementation="cudnn").astype(jnp.float32))

        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        step = jax.jit(jax.grad(loss), in_shardings=(place,) * 3)
        return step.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()

    assert "CustomSPMDPartitioning" in program(None)
    ours = program(mesh)
    assert "CustomSPMDPartitioning" not in ours
    assert "__cudnn$fmhaSoftmaxBackward" in ours
