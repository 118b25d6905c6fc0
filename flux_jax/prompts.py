"""Prompts to embeddings: both text encoders, and keeping them off the device when not needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.clip import CLIPTextEncoder
from flux_jax.errors import UserError
from flux_jax.fingerprint import component_digest
from flux_jax.functional import ModuleFunction
from flux_jax.sharding import spread
from flux_jax.t5 import T5Encoder
from flux_jax.tokenization import max_length, tokenize


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEmbeds:
    """Encoded prompts, accepted by the pipeline wherever a prompt is.

    Attributes:
      prompts: the P texts.
      prompt_embeds: (P, T, C) from T5, padding included.
      pooled_prompt_embeds: (P, V) from CLIP.
    """

    prompts: tuple[str, ...]
    prompt_embeds: Float[Array, "P T C"]
    pooled_prompt_embeds: Float[Array, "P V"]

    def take(self, rows: Sequence[int]) -> PromptEmbeds:
        """The prompts at `rows`, in that order."""
        index = np.asarray(rows)
        return PromptEmbeds(
            prompts=tuple(self.prompts[row] for row in rows),
            prompt_embeds=self.prompt_embeds[index],
            pooled_prompt_embeds=self.pooled_prompt_embeds[index],
        )


def _t5(encoder: T5Encoder, ids: Int[Array, "B T"]) -> Float[Array, "B T C"]:
    return encoder(ids)


def _clip(encoder: CLIPTextEncoder, ids: Int[Array, "B T"]) -> Float[Array, "B V"]:
    return encoder(ids).pooled


T5 = ModuleFunction(_t5)
CLIP = ModuleFunction(_clip)


def in_batches(
    function: Callable[..., Array], rows: Int[np.ndarray, "N T"], size: int
) -> Float[Array, "N ..."]:
    """`function` on `size` rows at a time; the last batch is filled up with its own last row.

    Every batch then runs the same compiled program, which is what makes a row's result independent
    of how many others there are.
    """
    outputs = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        filled = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        outputs.append(function(filled)[: len(batch)])
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


class TextEncoders:
    """Both text encoders and their tokenizers, on the device or waiting in host memory.

    Attributes:
      text_encoder, text_encoder_2: CLIP and T5; None once freed, or if never given.
      tokenizer, tokenizer_2: theirs, from transformers.
      offload: keep the encoders in host memory except while they encode.
    """

    def __init__(
        self,
        *,
        text_encoder: CLIPTextEncoder | None = None,
        text_encoder_2: T5Encoder | None = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        offload: bool = False,
    ):
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.offload = offload
        self._restore: list[Callable[[], None]] = []
        self._digests: dict[str, str] = {}
        if offload:
            self._move_away()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = jnp.bfloat16,
        mesh: jax.sharding.Mesh | None = None,
        offload: bool = False,
    ) -> TextEncoders:
        """The text encoders of a checkpoint alone; arguments as for `FluxPipeline`'s.

        Encoding before the transformer is loaded keeps the peak of device memory to the larger of
        the two instead of their sum.

        Example:
          encoders = TextEncoders.from_pretrained(path)
          embeds = encoders.encode(["a red circle"], max_sequence_length=512)
          encoders.free()
          pipe = FluxPipeline.from_pretrained(path, text_encoders=encoders)
          image = pipe(embeds, seed=0).images[0]
        """
        # Late: an encoder of given parts does not need the readers of checkpoints.
        from flux_jax.loading import load_text_encoders

        return load_text_encoders(path, dtype=dtype, mesh=mesh, offload=offload)

    def modules(self) -> dict[str, nnx.Module]:
        """The encoders that are there, by component name."""
        named = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: module for name, module in named.items() if module is not None}

    def digests(self) -> dict[str, str]:
        """Each encoder's `component_digest`; once computed, kept beyond `free`."""
        for name, module in self.modules().items():
            if name not in self._digests:
                self._digests[name] = component_digest(name, module)
        return dict(self._digests)

    def free(self) -> None:
        """Drop both encoders and their memory."""
        self.text_encoder = self.text_encoder_2 = None
        self._restore = []

    def move_to(self, mesh: jax.sharding.Mesh) -> None:
        """Spread the encoders over a mesh."""
        for module in self.modules().values():
            spread(module, mesh)
        if self.offload:
            self._move_away()

    def encode(
        self, prompts: Sequence[str], *, max_sequence_length: int | None = None, batch_size: int = 1
    ) -> PromptEmbeds:
        """Embeddings of P prompts; one that occurs several times is encoded once.

        Args:
          prompts: P texts.
          max_sequence_length: tokens of T5, padding included; its tokenizer's limit by default.
            CLIP always takes its own length.
          batch_size: prompts encoded at a time.

        Raises:
          UserError: an encoder was freed, or an encoder or tokenizer never given.
        """
        clip, t5 = self.text_encoder, self.text_encoder_2
        if clip is None or t5 is None or self.tokenizer is None or self.tokenizer_2 is None:
            raise UserError(
                "this pipeline has no text encoders (freed, or not loaded): pass prompts encoded "
                "by encode_prompt before"
            )
        unique = list(dict.fromkeys(prompts))
        clip_length = clip.config.max_position_embeddings
        clip_ids = tokenize(self.tokenizer, unique, clip_length, encoder="CLIP")
        length = max_sequence_length or max_length(self.tokenizer_2)
        t5_ids = tokenize(self.tokenizer_2, unique, length, encoder="T5")
        for restore in self._restore:
            restore()
        embeds = PromptEmbeds(
            prompts=tuple(unique),
            prompt_embeds=in_batches(T5.bind(t5), t5_ids, batch_size),
            pooled_prompt_embeds=in_batches(CLIP.bind(clip), clip_ids, batch_size),
        )
        if self.offload:
            jax.block_until_ready((embeds.prompt_embeds, embeds.pooled_prompt_embeds))
            self._move_away()
        return embeds.take([unique.index(prompt) for prompt in prompts])

    def _move_away(self) -> None:
        self._restore = [move_to_host(module) for module in self.modules().values()]


def move_to_host(module: nnx.Module) -> Callable[[], None]:
    """Keep a module's arrays in host memory; returns what puts them back where they were."""
    state = nnx.state(module)
    placement = jax.tree.map(lambda array: array.sharding, state)
    nnx.update(module, jax.device_get(state))

    def restore() -> None:
        nnx.update(module, jax.device_put(nnx.state(module), placement))

    return restore
