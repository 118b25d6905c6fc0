"""Prompts to embeddings: both text encoders, on the device or brought there when they encode."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax import arguments
from flux_jax.checkpoint import load_checkpoint, resolve_checkpoint, stored_component
from flux_jax.clip import CLIPTextEncoder
from flux_jax.components import TEXT_ENCODERS, TOKENIZERS
from flux_jax.encoding import StreamedT5, t5_states
from flux_jax.errors import UserError
from flux_jax.fingerprint import component_digest, component_settings
from flux_jax.functional import ModuleFunction
from flux_jax.prompt_embeds import PromptEmbeds, take_rows
from flux_jax.residence import AUTO, OFFLOADED, PLACEMENTS, RESIDENT, STREAMED, HostWeights, fits
from flux_jax.sharding import no_mesh_set, spread
from flux_jax.t5 import T5Encoder
from flux_jax.tokenization import load_tokenizer, max_length, tokenize


def _clip(encoder: CLIPTextEncoder, ids: Int[Array, "B T"]) -> Float[Array, "B V"]:
    return encoder(ids).pooled


CLIP = ModuleFunction(_clip)


def in_batches(
    function: Callable[[list[np.ndarray]], list[Array]], rows: Int[np.ndarray, "N T"], size: int
) -> Float[Array, "N ..."]:
    """`function` on batches of `size` rows; the last is filled up with its own last row.

    Every batch then runs the same compiled program, which is what makes a row's result independent
    of how many others there are.
    """
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % size, axis=0)])
    outputs = function(np.split(filled, len(filled) // size))
    whole = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)
    if len(whole) == len(rows):
        return whole
    return take_rows(whole, np.arange(len(rows), dtype=np.int32))


# A tokenizer of transformers keeps how it was last called: in two threads at once, one would pad as
# the other asked it to.
_TOKENIZING = threading.Lock()


class TextEncoders:
    """Both text encoders and their tokenizers.

    Attributes:
      text_encoder, text_encoder_2: CLIP and T5; None once freed, or if never given.
      tokenizer, tokenizer_2: theirs, as `flux_jax.tokenization.load_tokenizer` gives, or of
        transformers.
      placement: "resident" on the device, "offloaded" to host memory except while they encode, or
        "streamed": as offloaded, but of T5 two blocks at a time are on the device.
    """

    def __init__(
        self,
        *,
        text_encoder: CLIPTextEncoder | None = None,
        text_encoder_2: T5Encoder | StreamedT5 | None = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        placement: str = RESIDENT,
    ):
        """Encoders of given parts.

        Args:
          text_encoder, text_encoder_2, tokenizer, tokenizer_2, placement: see the class. With
            "streamed", a `T5Encoder`'s arrays are copied to host memory.

        Raises:
          UserError: another placement.
        """
        arguments.choice("placement", placement, (RESIDENT, OFFLOADED, STREAMED))
        if placement == STREAMED and isinstance(text_encoder_2, T5Encoder):
            text_encoder_2 = StreamedT5.from_module(text_encoder_2)
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.placement = placement
        self._digests: dict[str, str] = {}
        self._settings: dict[str, str] = {}
        self._waiting = None if placement == RESIDENT else HostWeights(self._arrays())

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = jnp.bfloat16,
        mesh: jax.sharding.Mesh | None = None,
        placement: str = AUTO,
        revision: str | None = None,
    ) -> TextEncoders:
        """The text encoders of a checkpoint alone.

        Encoding before the transformer is loaded keeps the peak of device memory to the larger of
        the two instead of their sum.

        Args:
          path, dtype, mesh, revision: as for `FluxPipeline.from_pretrained`.
          placement: as its `text_encoders`. "streamed", T5 is read from the checkpoint's files at
            each call and takes no host memory in between. On a mesh, "auto" is "resident".

        Raises:
          UserError: a checkpoint without an encoder or tokenizer, or another placement.

        Example:
          encoders = TextEncoders.from_pretrained(path)
          embeds = encoders.encode(["a red circle"], max_sequence_length=512)
          encoders.free()
          pipe = FluxPipeline.from_pretrained(path, text_encoders=encoders)
          image = pipe(embeds, seed=0).images[0]
        """
        arguments.choice("text_encoders", placement, PLACEMENTS)
        dtype = arguments.dtype(dtype)
        path = resolve_checkpoint(path, TEXT_ENCODERS, revision=revision)
        streamed = {}
        if placement in (AUTO, STREAMED):
            stored = stored_component(path, "text_encoder_2", dtype=dtype)
            if placement == AUTO:
                placement = RESIDENT if mesh is not None or fits(stored.nbytes) else STREAMED
            if placement == STREAMED:
                config: Any = stored.config
                t5 = StreamedT5(config, stored.open, dtype=dtype, mesh=mesh)
                streamed = {"text_encoder_2": t5}
        wanted = [name for name in TEXT_ENCODERS if name not in streamed]
        checkpoint = load_checkpoint(path, components=wanted, dtype=dtype, mesh=mesh)
        missing = [name for name in TOKENIZERS if name not in checkpoint.tokenizer_paths]
        if missing:
            raise UserError(f"{path} has no {' and no '.join(missing)}, which prompts need")
        return cls(
            **checkpoint.modules,
            **streamed,
            **{name: load_tokenizer(checkpoint.tokenizer_paths[name]) for name in TOKENIZERS},
            placement=placement,
        )

    def modules(self) -> dict[str, CLIPTextEncoder | T5Encoder | StreamedT5]:
        """The encoders that are there, by component name."""
        named = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: module for name, module in named.items() if module is not None}

    def digests(self) -> dict[str, str]:
        """Each encoder's `component_digest`; of one that is freed, if it was asked for before."""
        for name, module in self.modules().items():
            # Each time: weights may have been written to.
            streamed = isinstance(module, StreamedT5)
            found = module.digest(name) if streamed else component_digest(name, module)
            self._digests[name] = found
            self._settings[name] = component_settings(module)
        return dict(self._digests)

    def settings(self) -> dict[str, str]:
        """The `component_settings` of those encoders that `digests` knows."""
        return dict(self._settings)

    def free(self) -> None:
        """Drop both encoders and their memory."""
        if self._digests:
            # What stays known of them is how they are now.
            self.digests()
        self.text_encoder = self.text_encoder_2 = self._waiting = None

    def move_to(self, mesh: jax.sharding.Mesh) -> None:
        """Spread the encoders over a mesh."""
        if isinstance(self.text_encoder_2, StreamedT5):
            self.text_encoder_2 = self.text_encoder_2.on(mesh)
        for module in self._arrays():
            spread(module, mesh)
        if self._waiting is not None:
            self._waiting = HostWeights(self._arrays())

    def _arrays(self) -> list[nnx.Module]:
        """The encoders whose weights are here, on the device or waiting."""
        return [module for module in self.modules().values() if isinstance(module, nnx.Module)]

    @no_mesh_set()
    def encode(
        self,
        prompts: str | Sequence[str],
        *,
        max_sequence_length: int | None = None,
        batch_size: int = 1,
        for_digests: bool = False,
    ) -> PromptEmbeds:
        """Embeddings of P prompts; one that occurs several times is encoded once.

        Streamed weights are read once for all of them.

        Args:
          prompts: P texts; one alone may stand for itself.
          max_sequence_length: tokens of T5, padding included; its tokenizer's limit by default.
            CLIP always takes its own length.
          batch_size: prompts encoded at a time.
          for_digests: that `digests` is called later: streamed weights are not read for it again.

        Raises:
          UserError: an encoder was freed, or an encoder or tokenizer never given; or an argument
            that cannot be used.
        """
        texts = arguments.texts("prompts", prompts)
        batch_size = arguments.integer("batch_size", batch_size)
        clip, t5 = self.text_encoder, self.text_encoder_2
        if clip is None or t5 is None or self.tokenizer is None or self.tokenizer_2 is None:
            raise UserError(
                "this pipeline has no text encoders (freed, or not loaded): pass prompts encoded "
                "by encode_prompt before"
            )
        unique = list(dict.fromkeys(texts))
        clip_length = clip.config.max_position_embeddings
        length = max_length(self.tokenizer_2)
        if max_sequence_length is not None:
            length = arguments.integer("max_sequence_length", max_sequence_length)
        with _TOKENIZING:
            clip_ids = tokenize(self.tokenizer, unique, clip_length, encoder="CLIP")
            t5_ids = tokenize(self.tokenizer_2, unique, length, encoder="T5")
        t5_batches = functools.partial(_t5_states, t5, for_digests=for_digests)
        with contextlib.nullcontext() if self._waiting is None else self._waiting.on_device():
            clip_states = CLIP.bind(clip)
            embeds = PromptEmbeds(
                prompts=tuple(unique),
                prompt_embeds=in_batches(t5_batches, t5_ids, batch_size),
                pooled_prompt_embeds=in_batches(
                    lambda batches: [clip_states(ids) for ids in batches], clip_ids, batch_size
                ),
            )
            if self._waiting is not None:
                jax.block_until_ready((embeds.prompt_embeds, embeds.pooled_prompt_embeds))
                del clip_states
        rows = {text: row for row, text in enumerate(unique)}
        return embeds.take([rows[text] for text in texts])


def _t5_states(
    encoder: T5Encoder | StreamedT5, batches: list[np.ndarray], *, for_digests: bool
) -> list[Array]:
    if isinstance(encoder, StreamedT5):
        return encoder.states(batches, for_digest=for_digests)
    return t5_states(encoder, batches)
