"""What prompts become: the embeddings that the transformer is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from flux_jax import arguments
from flux_jax.errors import UserError


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptEmbeds:
    """Encoded prompts, accepted by the pipeline wherever a prompt is.

    A pytree of the two arrays, for `jax.jit` and `jax.grad`; the texts are part of its structure.

    Attributes:
      prompts: the P texts, at least one.
      prompt_embeds: (P, T, C) from T5, padding included.
      pooled_prompt_embeds: (P, V) from CLIP.

    Raises:
      UserError: no prompt, another number of rows than of prompts, or arrays of another rank.
    """

    prompts: tuple[str, ...]
    prompt_embeds: Float[Array, "P T C"]
    pooled_prompt_embeds: Float[Array, "P V"]

    def __post_init__(self) -> None:
        arguments.check_shapes(vars(self), {"prompt_embeds": ("prompts", "tokens", "width")})
        arguments.check_shapes(vars(self), {"pooled_prompt_embeds": ("prompts", "width")})
        rows = len(self.prompt_embeds), len(self.pooled_prompt_embeds)
        if not self.prompts or rows != (len(self.prompts), len(self.prompts)):
            raise UserError(
                "prompts, prompt_embeds and pooled_prompt_embeds must have a row for each prompt, "
                f"at least one; got {len(self.prompts)}, {rows[0]} and {rows[1]}"
            )

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
        """As JAX takes a pytree apart."""
        names = ("prompt_embeds", "pooled_prompt_embeds")
        keys = map(jax.tree_util.GetAttrKey, names)
        return tuple(zip(keys, map(vars(self).get, names), strict=True)), self.prompts

    @classmethod
    def tree_unflatten(cls, prompts: tuple[str, ...], arrays: Sequence[Any]) -> PromptEmbeds:
        """As JAX puts it together, of anything: nothing is checked."""
        embeds = object.__new__(cls)
        named = {"prompt_embeds": arrays[0], "pooled_prompt_embeds": arrays[1]}
        vars(embeds).update(prompts=prompts, **named)
        return embeds

    def take(self, rows: Sequence[int]) -> PromptEmbeds:
        """The prompts at `rows`, in that order."""
        index = np.asarray(rows, np.int32)
        return PromptEmbeds(
            prompts=tuple(self.prompts[row] for row in rows),
            prompt_embeds=take_rows(self.prompt_embeds, index),
            pooled_prompt_embeds=take_rows(self.pooled_prompt_embeds, index),
        )


@jax.jit
def _gather(array: Array, index: Array) -> Array:
    return array[index]


def take_rows(array: Any, index: Int[np.ndarray, " R"]) -> Any:
    """Rows of an array where it is, with no transfer that is not asked for."""
    if isinstance(array, np.ndarray):
        return array[index]
    return _gather(array, jax.device_put(index))
