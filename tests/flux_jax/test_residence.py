"""Weights that wait in host memory: what is written to them counts, and threads may share them."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.layers import Linear
from flux_jax.pipeline import FluxPipeline
from flux_jax.residence import HostWeights, modulation_layers
from flux_jax.sharding import make_mesh
from tests.small_pipeline import small_pipeline

STEPS = {"num_inference_steps": 1, "progress": False, "output_type": "latent", "seed": 0}


def linear(seed: int = 0) -> Linear:
    return Linear(4, 4, dtype=jnp.float32, rngs=nnx.Rngs(seed))


def kinds(*modules: Any) -> set[type]:
    return {
        np.ndarray if isinstance(leaf, np.ndarray) else jax.Array
        for module in modules
        for leaf in jax.tree.leaves(nnx.state(module))
    }


def halve(module: nnx.Module) -> None:
    nnx.update(module, jax.tree.map(lambda v: jnp.asarray(v) / 2, nnx.state(module)))


@pytest.mark.parametrize("options", [{"offload_modulation": True}, {"placement": "offloaded"}])
def test_what_is_written_while_they_wait_counts(options):
    resident, waiting = small_pipeline(), small_pipeline(**options)
    before = resident("a red circle", **STEPS).images
    for pipe in (resident, waiting):
        halve(pipe.transformer)
        halve(pipe.text_encoders.text_encoder)
        halve(pipe.text_encoders.text_encoder_2)
    expected = resident("a red circle", **STEPS).images
    assert not np.array_equal(expected, before)
    # The second call draws with what the first one put back.
    for _ in range(2):
        np.testing.assert_array_equal(waiting("a red circle", **STEPS).images, expected)
    assert waiting.fingerprint() == resident.fingerprint()


def test_what_is_written_on_the_device_stays():
    module = linear()
    weights = HostWeights([module])
    waited = module.weight.get_value()
    with weights.on_device():
        assert kinds(module) == {jax.Array}
    # Nothing was copied: it is the array that waited.
    assert module.weight.get_value() is waited
    with weights.on_device():
        module.weight.set_value(jnp.full((4, 4), 7.0))
    assert kinds(module) == {np.ndarray}
    np.testing.assert_array_equal(module.weight.get_value(), np.full((4, 4), 7.0))


@pytest.mark.parametrize("mesh", [None, {"data": 2}])
def test_two_pipelines_share_what_waits(mesh):
    whole = small_pipeline()
    parts: dict[str, Any] = {
        name: getattr(whole, name) for name in ("transformer", "vae", "scheduler", "text_encoders")
    }
    place = None if mesh is None else make_mesh(**mesh)
    first = FluxPipeline(**parts, offload_modulation=True, mesh=place)
    expected = first("a red circle", **STEPS).images
    second = FluxPipeline(**parts, offload_modulation=True)
    for pipe in (second, first):
        np.testing.assert_array_equal(pipe("a red circle", **STEPS).images, expected)
        assert kinds(*modulation_layers(pipe.transformer)) == {np.ndarray}


def test_they_stay_until_the_last_one_leaves():
    module = linear()
    weights = HostWeights([module])
    with weights.on_device():
        with weights.on_device():
            assert kinds(module) == {jax.Array}
        assert kinds(module) == {jax.Array}
    assert kinds(module) == {np.ndarray}
    with weights.on_device():
        weights.bring_back()
    assert kinds(module) == {jax.Array}


def test_threads_share_a_pipeline():
    pipe = small_pipeline(placement="offloaded")
    prompts = ["a red circle", "a blue square", "a green cube", "the star"]
    expected = {prompt: pipe(prompt, **STEPS).images for prompt in prompts}
    start = threading.Barrier(len(prompts))
    found: dict[str, Any] = {}

    def draw(prompt: str) -> None:
        start.wait()
        try:
            found[prompt] = pipe(prompt, **STEPS).images
        except Exception as error:
            found[prompt] = error

    threads = [threading.Thread(target=draw, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in prompts:
        np.testing.assert_array_equal(found[prompt], expected[prompt])
    assert kinds(*pipe.text_encoders.modules().values()) == {np.ndarray}


def test_a_device_that_is_full_keeps_none_of_them(monkeypatch):
    modules = [linear(0), linear(1)]
    weights = HostWeights(modules)
    place, calls = jax.device_put, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return place(*args)

    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(RuntimeError, match="EXHAUSTED"), weights.on_device():
        pass
    assert kinds(*modules) == {np.ndarray}
    with weights.on_device():
        assert kinds(*modules) == {jax.Array}
