"""Encoded prompts as a value: checked where they are made, and a pytree of their arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.errors import UserError
from flux_jax.prompt_embeds import PromptEmbeds


def test_arrays_of_another_rank_are_refused():
    for shapes, message in (
        (((3, 4), (2, 5)), r"prompt_embeds must have shape \(prompts, tokens, width\), got \(3, 4"),
        (((2, 3, 4), (5,)), r"pooled_prompt_embeds must have shape \(prompts, width\), got \(5,\)"),
    ):
        # Not by the constructor, whose annotations are checked under pytest.
        made = PromptEmbeds.tree_unflatten(("a", "b"), [jnp.ones(shape) for shape in shapes])
        with pytest.raises(UserError, match=f"^{message}"):
            made.__post_init__()


def test_a_pytree_of_the_two_arrays():
    """As prompt tuning has it."""
    made = PromptEmbeds(
        prompts=("a", "b"),
        prompt_embeds=jnp.ones((2, 3, 4)),
        pooled_prompt_embeds=jnp.ones((2, 5)),
    )
    paths, _ = jax.tree_util.tree_flatten_with_path(made)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert names == [".prompt_embeds", ".pooled_prompt_embeds"]

    @jax.jit
    def loss(x: PromptEmbeds) -> jax.Array:
        return 3 * jnp.sum(x.take([1]).prompt_embeds) + jnp.sum(x.pooled_prompt_embeds)

    found = jax.grad(loss)(made)
    assert found.prompts == made.prompts
    np.testing.assert_array_equal(found.prompt_embeds[0], np.zeros((3, 4)))
    np.testing.assert_array_equal(found.prompt_embeds[1], np.full((3, 4), 3.0))
    np.testing.assert_array_equal(found.pooled_prompt_embeds, np.ones((2, 5)))
    moved = jax.tree.map(lambda x, g: x - g, made, found)
    assert isinstance(moved, PromptEmbeds)
    # Whatever stands in for an array is let through, as JAX needs it.
    assert jax.tree.map(lambda _: None, made).prompt_embeds is None
