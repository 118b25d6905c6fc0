"""Which prompt each image of a call takes, and its embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flux_jax import arguments
from flux_jax.errors import UserError
from flux_jax.plan import Plan
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompts import TextEncoders

Prompt = str | Sequence[str] | PromptEmbeds


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImagePrompts:
    """The prompts of a call's images, each prompt encoded once however many images it has.

    Attributes:
      embeds: the prompts.
      rows: which of them each image takes.
    """

    embeds: PromptEmbeds
    rows: Sequence[int]

    def text(self, image: int) -> str:
        """The prompt of an image."""
        return self.embeds.prompts[self.rows[image]]

    def take(self, images: Sequence[int]) -> PromptEmbeds:
        """A row for each of some images."""
        return self.embeds.take([self.rows[image] for image in images])


def prompt_rows(
    prompt: Prompt, negative: Prompt | None, plan: Plan
) -> tuple[list[int], list[int] | None]:
    """Which prompt and which negative prompt each image takes; None if a negative has no effect.

    Raises:
      UserError: prompts that are no texts, or negative ones of another number.
    """
    count = _length("prompt", prompt)
    rows = [row for row in range(count) for _ in range(plan.images_per_prompt)]
    if negative is None or not plan.takes_negative:
        return rows, None
    negatives = _length("negative_prompt", negative)
    if negatives not in (1, count):
        raise UserError(
            f"negative_prompt must be one text or {count}, one per prompt, got {negatives}"
        )
    return rows, rows if negatives == count else [0] * len(rows)


def embed_rows(
    encoders: TextEncoders, wanted: Sequence[tuple[Prompt, Sequence[int]]], plan: Plan
) -> list[ImagePrompts]:
    """The prompts of all images; texts are encoded together, in one pass over T5's weights.

    Args:
      encoders: used if any of the prompts is not encoded yet.
      wanted: prompts, and of each the rows that images take.
      plan: the call.

    Raises:
      UserError: a prompt that is no text, or encoders that are not there.
    """
    texts = [
        text
        for prompt, _ in wanted
        if not isinstance(prompt, PromptEmbeds)
        for text in arguments.texts("prompt", prompt)
    ]
    unique = list(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(unique)}
    encoded: Any = None
    if unique:
        encoded = encoders.encode(
            unique,
            max_sequence_length=plan.max_sequence_length,
            batch_size=plan.device_batch_size,
        )
    found = []
    for prompt, rows in wanted:
        if isinstance(prompt, PromptEmbeds):
            found.append(ImagePrompts(embeds=prompt, rows=rows))
            continue
        places = [row_of[text] for text in arguments.texts("prompt", prompt)]
        found.append(ImagePrompts(embeds=encoded, rows=[places[row] for row in rows]))
    return found


def _length(name: str, prompt: Prompt) -> int:
    is_encoded = isinstance(prompt, PromptEmbeds)
    return len(prompt.prompts if is_encoded else arguments.texts(name, prompt))
