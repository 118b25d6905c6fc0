"""Weights are arguments of compiled functions, one program serves many modules, meshes work."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flux_jax import compile_cache
from flux_jax.functional import ModuleFunction
from flux_jax.layers import Linear


def linear(seed: int, features: int = 8) -> Linear:
    """Of whole numbers, which add up to the same in any order."""
    layer = Linear(features, features, axes=(None, None), dtype=jnp.float32, rngs=nnx.Rngs(seed))
    weight = np.random.default_rng(seed).integers(-9, 10, (features, features))
    layer.weight.set_value(jnp.asarray(weight, jnp.float32))
    return layer


def test_one_program_for_modules_of_one_structure():
    traces = []

    def apply(module, x):
        traces.append(x.shape)
        return module(x)

    function = ModuleFunction(apply)
    x = np.ones((2, 8), np.float32)
    first, second = linear(0), linear(1)
    for module in (first, second, first):
        expected = x @ np.asarray(module.weight[...]).T
        np.testing.assert_allclose(function.bind(module)(x), expected, rtol=1e-6)
    assert traces == [(2, 8)]
    function.bind(first)(np.ones((3, 8), np.float32))
    assert traces == [(2, 8), (3, 8)]


def test_weights_are_no_constants():
    function = ModuleFunction(lambda module, x: module(x)).bind(linear(0, features=64))
    x = np.ones((1, 64), np.float32)
    text = function.program.lower(function.leaves, (x,)).as_text()
    assert "tensor<64x64xf32>" in text
    assert 'dense<"0x' not in text


def test_static_arguments_select_the_program():
    function = ModuleFunction(lambda module, x, *, times: module(x) * times)
    x, module = np.ones((1, 8), np.float32), linear(0)
    once, twice = (function.bind(module, times=times)(x) for times in (1, 2))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def doubled(module, x):
    return module(x) * 2


def test_functions_whose_name_says_too_little_are_not_stored(tmp_path, monkeypatch):
    """One stored program would serve both lambdas, and a closure whatever it closes over."""
    monkeypatch.setattr(compile_cache, "_enabled", [tmp_path])
    x, module = np.ones((1, 8), np.float32), linear(0)
    want = x @ np.asarray(module.weight[...]).T
    functions = {
        "lambda": (lambda m, x: m(x), lambda m, x: m(x) * 2),
        "closure": tuple((lambda m, x, k=k: m(x) * k) for k in (1, 2)),
        "partial": tuple(functools.partial(lambda m, x, k: m(x) * k, k=k) for k in (1, 2)),
        "of another package": (Linear.__call__, doubled),
    }
    for kind, pair in functions.items():
        got = [ModuleFunction(function).bind(module)(x) for function in pair]
        np.testing.assert_array_equal(got, [want, 2 * want], err_msg=kind)
    (stored,) = (tmp_path / compile_cache.LOWERED).iterdir()
    assert stored.name.startswith("call")


def test_weights_that_are_all_on_the_host_have_no_device():
    module = linear(0)
    nnx.update(module, jax.device_get(nnx.state(module)))
    with pytest.raises(ValueError, match="all 2 arrays of the module are in host memory"):
        ModuleFunction(doubled).bind(module)


def test_on_a_mesh_results_are_replicated():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    module = linear(0)
    expected = ModuleFunction(lambda m, x: m(x)).bind(module)(np.ones((2, 8), np.float32))
    sharding = NamedSharding(mesh, PartitionSpec("tensor", None))
    module.weight.set_value(jax.device_put(module.weight.get_value(), sharding))
    module.bias.set_value(
        jax.device_put(module.bias.get_value(), NamedSharding(mesh, PartitionSpec()))
    )
    bound = ModuleFunction(lambda m, x: m(x)).bind(module)
    result = bound(np.ones((2, 8), np.float32))
    assert result.sharding.is_fully_replicated
    assert result.sharding.mesh == mesh
    np.testing.assert_allclose(result, expected, rtol=1e-6)
