"""Random weights where they will lie."""

import jax
import numpy as np

from benchmarks.random_models import random_embeds, random_transformer
from flux_jax.sharding import flat_shardings, make_mesh
from flux_jax.tree import to_flat
from tests.small_pipeline import TRANSFORMER as CONFIG


def test_weights_lie_on_their_devices_and_do_not_depend_on_them():
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    spread = random_transformer(CONFIG, activation_bits=8, mesh=mesh)
    places = flat_shardings(spread, mesh)
    alone = to_flat(random_transformer(CONFIG, activation_bits=8))
    for name, value in to_flat(spread).items():
        assert value.sharding == places[name], name
        np.testing.assert_array_equal(value, alone[name], err_msg=name)


def test_no_two_weights_are_alike():
    flat = to_flat(random_transformer(CONFIG))
    first, second = (flat[f"double_blocks.0.{kind}_attn.qkv.weight"] for kind in ("img", "txt"))
    assert not np.array_equal(first, second)


def test_embeddings_have_the_transformers_widths():
    embeds = random_embeds(CONFIG, 3, 7)
    assert embeds.prompt_embeds.shape == (3, 7, CONFIG.context_in_dim)
    assert embeds.pooled_prompt_embeds.shape == (3, CONFIG.vec_in_dim)
