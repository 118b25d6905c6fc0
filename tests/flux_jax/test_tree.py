"""Modules as flat dictionaries, and put together again."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flux_jax.components import abstract_module
from flux_jax.tree import split_flat, to_flat
from tests.random_module import random_module
from tests.small_pipeline import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_taken_apart_and_put_together(name):
    module = random_module(name, CONFIGS[name])
    rebuild, flat = split_flat(module)
    named = to_flat(module)
    assert flat.keys() == named.keys()
    assert all(flat[path] is named[path] for path in named)
    assert nnx.graphdef(rebuild(flat)) == nnx.graphdef(module)
    # So that both have one program.
    assert jax.tree.structure(rebuild(flat)) == jax.tree.structure(module)


def test_a_module_that_was_put_together_is_gone_when_it_is_dropped():
    """Without the garbage collector, which may come by late: these are gigabytes of a device."""
    rebuild, flat = split_flat(abstract_module("transformer", CONFIGS["transformer"]))
    gc.collect()
    gc.disable()
    before = {id(array) for array in jax.live_arrays()}
    try:
        module = rebuild({path: jnp.zeros(like.shape, like.dtype) for path, like in flat.items()})
        assert len(to_flat(module)) == len(flat)
        del module
        assert not [array for array in jax.live_arrays() if id(array) not in before]
    finally:
        gc.enable()
