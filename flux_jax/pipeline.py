"""Text to image: prompts, noise, denoising loop and decoder, behind diffusers' arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import flux_jax
from flux_jax import arguments, images
from flux_jax.autoencoder import Autoencoder
from flux_jax.configs import SchedulerConfig
from flux_jax.denoise import denoise
from flux_jax.fingerprint import (
    component_digest,
    component_settings,
    config_settings,
    fingerprint,
)
from flux_jax.functional import common_sharding
from flux_jax.kernels import suit_mesh, use_kernels
from flux_jax.lora import LoRA, attach, attached, detach
from flux_jax.metadata import GenerationRecord
from flux_jax.outputs import Callback, FluxOutput, Preview
from flux_jax.parts import (
    check_devices,
    check_embeds,
    check_same_length,
    check_widths,
    encoded_length,
)
from flux_jax.plan import Plan, initial_noise, make_plan, sequence_length
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompt_rows import ImagePrompts, Prompt, embed_rows, prompt_rows
from flux_jax.prompts import TextEncoders
from flux_jax.residence import AUTO, PLACEMENTS, HostWeights, modulation_layers
from flux_jax.sharding import no_mesh_set, spread
from flux_jax.tokenization import max_length
from flux_jax.transformer import FluxTransformer


class FluxPipeline:
    """FLUX.1 from prompts to images.

    Example:
      pipe = FluxPipeline.from_pretrained("tiny")
      pipe("a red circle above a blue square", seed=0).images[0].save("image.png")

    Attributes:
      transformer, vae: the models.
      text_encoders: CLIP and T5 with their tokenizers.
      scheduler: the noise schedule's configuration.
      vae_tiling: True or False to decode in tiles always or never; None decides by the image's
        size and the memory that the device has left.
      name: what the model is called in an image's metadata.
    """

    def __init__(
        self,
        *,
        transformer: FluxTransformer,
        vae: Autoencoder,
        scheduler: SchedulerConfig,
        text_encoders: TextEncoders | None = None,
        offload_modulation: bool = False,
        vae_tiling: bool | None = None,
        name: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """A pipeline of given parts.

        Args:
          transformer, vae, scheduler, vae_tiling, name: see the class.
          text_encoders: without them, calls take encoded prompts only.
          offload_modulation: see the property.
          mesh: devices (`flux_jax.make_mesh`) to which the parts are moved: images are split over
            its axis `data`, the tokens of each over `sequence`, the weights over `tensor`. By
            default the parts stay where they are.

        Raises:
          UserError: parts whose widths do not fit together, or a mesh with other axes or with
            other processes' devices.
        """
        text_encoders = TextEncoders() if text_encoders is None else text_encoders
        check_widths(transformer, vae, text_encoders)
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.text_encoders = text_encoders
        if mesh is not None:
            check_devices(mesh)
            spread(transformer, mesh)
            spread(vae, mesh)
            text_encoders.move_to(mesh)
        suit_mesh(transformer)
        self.vae_tiling = vae_tiling
        self.name = name
        self._loras: tuple[str, ...] = ()
        self._kernels: str | None = None
        self._attention: str | None = None
        self._waiting: HostWeights | None = None
        if offload_modulation:
            self._offload()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = jnp.bfloat16,
        mesh: jax.sharding.Mesh | None = None,
        text_encoders: TextEncoders | str = AUTO,
        offload_modulation: bool = False,
        vae_tiling: bool | None = None,
        transformer: FluxTransformer | None = None,
        vae: Autoencoder | None = None,
        kernels: str | None = None,
        attention: str | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> FluxPipeline:
        """A pipeline from a checkpoint, its weights straight onto the device or mesh.

        Args:
          path: a folder written by `python -m convert`, a folder in diffusers' layout, a Hugging
            Face repository id, or the name of a model that ships with the package: "tiny", or
            "tiny-ternary", its 1.58-bit student.
          dtype: of all weights and so of the computation: bfloat16 or float32.
          mesh: devices to draw on, as for a pipeline of given parts; without one, JAX's default
            device alone (`jax_default_device`, or the first).
          text_encoders: where they are: "resident" on the device, "offloaded" to host memory
            except while they encode, or "streamed" from the checkpoint's files, two blocks of T5
            on the device at a time; the image is the same, bit for bit. "auto" is "resident" where
            a quarter of the device's memory is left beside all weights, else "streamed". Or
            encoders to use in place of the checkpoint's; `TextEncoders()` for none.
          offload_modulation: see the property.
          vae_tiling: see the class.
          transformer, vae: used in place of the checkpoint's, which are then not read; moved to the
            mesh.
          kernels, attention: as in `use_kernels`.
          name: see the class; by default `path`.
          revision: branch, tag or commit of a hub repository: a commit's files never change.

        Raises:
          UserError: a checkpoint that cannot be loaded, a dtype that cannot be computed in, or
            another placement.
        """
        # Late: a pipeline of given parts does not need the readers of checkpoints.
        from flux_jax.loading import load_image_parts, local_folder

        if mesh is not None:
            check_devices(mesh)
        if isinstance(text_encoders, str):
            arguments.choice("text_encoders", text_encoders, PLACEMENTS)
        given = {"transformer": transformer, "vae": vae}
        models = {name: module for name, module in given.items() if module is not None}
        if mesh is not None:
            # What is read comes to the mesh by itself.
            for module in models.values():
                spread(module, mesh)
            if isinstance(text_encoders, TextEncoders):
                text_encoders.move_to(mesh)
        folder = local_folder(
            path,
            revision=revision,
            without=models,
            text_encoders=isinstance(text_encoders, str),
        )
        parts = load_image_parts(folder, dtype=dtype, mesh=mesh, given=models)
        if isinstance(text_encoders, str):
            # Last: "auto" looks at what memory is left.
            text_encoders = TextEncoders.from_pretrained(
                folder, dtype=dtype, mesh=mesh, placement=text_encoders
            )
        pipe = cls(
            text_encoders=text_encoders,
            offload_modulation=offload_modulation,
            vae_tiling=vae_tiling,
            name=str(path) if name is None else name,
            **parts,
        )
        pipe.use_kernels(kernels=kernels, attention=attention)
        return pipe

    def use_kernels(self, *, kernels: str | None = None, attention: str | None = None) -> None:
        """Which kernels compute the steps from now on.

        Args:
          kernels: of linears with packed ternary weights: "mosaic" (Hopper), "triton" (Ampere and
            newer), or "jax", the reference, anywhere, also of what prepares an attention. None
            leaves the choice to `pallas_kernels`.
          attention: "cudnn", "mosaic", "tokamax", "cudnn_fp8", "xla_fp8" or "xla"; see
            `flux_jax.attention`. None takes cuDNN on a GPU, XLA elsewhere.

        Raises:
          UserError: no such name, or what it names cannot run here; says why.
        """
        use_kernels(self.transformer, kernels=kernels, attention_by=attention)
        self._kernels, self._attention = kernels, attention

    @property
    def kernels(self) -> str | None:
        """As named to `use_kernels`; None where the choice was left."""
        return self._kernels

    @property
    def attention(self) -> str | None:
        """As named to `use_kernels`; None where the choice was left."""
        return self._attention

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Put a LoRA beside the transformer's weights, whatever kind they are, from now on.

        Several add up. Nothing is merged: a step takes a little longer, ternary weights stay
        packed, and `unload_loras` gives back the transformer that was there before.

        Args:
          path: a safetensors file, or a hub id, as `flux_jax.load_lora` takes it.
          scale: by which its changes are multiplied; may be negative.

        Raises:
          UserError: no such file, another kind of adapter, or one that does not fit the
            transformer.
        """
        # Late, as all that reads checkpoints.
        from flux_jax.checkpoint import load_lora

        self.add_lora(load_lora(path, self.transformer.config, scale=scale))

    def add_lora(self, lora: LoRA) -> None:
        """As `load_lora`, of a LoRA that was read before."""
        with self._weights_on_device():
            attach(self.transformer, lora)
        # By name: what was read is on the device now.
        self._loras += (str(lora),)

    def save_lora(self, path: str | Path, *, force: bool = False) -> None:
        """Write the LoRAs beside the transformer's weights as one, as after training them.

        Args:
          path: the safetensors file; see `flux_jax.save_lora`.
          force: replace a file that is there.

        Raises:
          UserError: there is no LoRA, or the file cannot be written.
        """
        from flux_jax.checkpoint import save_lora

        with self._weights_on_device():
            lora = attached(self.transformer)
        save_lora(path, lora, self.transformer.config, force=force)

    def unload_loras(self) -> None:
        """Take all LoRAs off the transformer."""
        with self._weights_on_device():
            detach(self.transformer)
        self._loras = ()

    @property
    def loras(self) -> tuple[str, ...]:
        """The LoRAs in use, each as PATH:SCALE."""
        return self._loras

    def _offload(self) -> None:
        home = common_sharding(jax.tree.leaves(self.transformer))
        self._waiting = HostWeights(modulation_layers(self.transformer), home=home)

    @contextlib.contextmanager
    def _weights_on_device(self) -> Iterator[None]:
        """For the length of a block that changes layers, no weights wait on the host."""
        if self._waiting is None:
            yield
            return
        self._waiting.bring_back()
        try:
            yield
        finally:
            self._offload()

    def encode_prompt(
        self, prompt: str | Sequence[str], *, max_sequence_length: int | None = None
    ) -> PromptEmbeds:
        """Embeddings that a call takes in place of its prompt.

        Args:
          prompt: one text or several.
          max_sequence_length: T5 tokens, padding included; the model's own by default.

        Raises:
          UserError: the text encoders were freed or never given.
        """
        length = sequence_length(self.transformer.config, self._token_limit, max_sequence_length)
        texts = arguments.texts("prompt", prompt)
        return self.text_encoders.encode(texts, max_sequence_length=length)

    def free_text_encoders(self) -> None:
        """Drop both text encoders and their memory; calls then need `encode_prompt`'s results."""
        self.text_encoders.free()

    @no_mesh_set()
    def fingerprint(self) -> str:
        """A short name for the weights and settings of all components; see `flux_jax.fingerprint`.

        Reads every weight once. Text encoders that were freed before it was ever asked for are
        left out, which changes it.
        """
        models = {"transformer": self.transformer, "vae": self.vae}
        digests = {name: component_digest(name, module) for name, module in models.items()}
        digests.update(self.text_encoders.digests())
        settings = {name: component_settings(module) for name, module in models.items()}
        settings["scheduler"] = config_settings(self.scheduler)
        return fingerprint(digests, {**settings, **self.text_encoders.settings()})

    def plan(self, **settings: Any) -> Plan:
        """What a call with these arguments would do; they are checked, and nothing is computed.

        Args:
          **settings: of the call's arguments those that all images share, such as `height`.

        Raises:
          UserError: an argument out of its range.
        """
        return make_plan(
            self.transformer.config,
            self.vae.config,
            self.scheduler,
            token_limit=self._token_limit,
            mesh=None if self.mesh is None else self.mesh.shape,
            **settings,
        )

    @property
    def offload_modulation(self) -> bool:
        """Whether the weights of the modulation vectors wait in host memory while the loop runs.

        They are a quarter of the transformer, and are moved when the pipeline is made.
        """
        return self._waiting is not None

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that the transformer lies on, if they are a mesh."""
        return self.transformer.mesh

    @property
    def _token_limit(self) -> int:
        return max_length(self.text_encoders.tokenizer_2)

    @no_mesh_set()
    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: Prompt | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        seed: int | Sequence[int] | Int[Any, " N"] | None = None,
        key: Array | None = None,
        latents: Float[Any, "N I P"] | None = None,
        output_type: str = "pil",
        return_latents: bool = False,
        batch_size: int | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> FluxOutput:
        """Draws N = prompts x `num_images_per_prompt` images, prompt by prompt.

        Image i starts from noise of its own: seed `seed + i`, or `fold_in(key, i)`. Images are
        drawn `batch_size` at a time. With the default of 1, all images run through one program of
        one shape, so that an image is the same bit for bit whether drawn alone or among others.
        With more, small models run faster, and an image is the same to rounding.

        Args:
          prompt: a text, several, or the result of `encode_prompt`.
          negative_prompt: what to steer away from, one for all prompts or one for each; acts only
            with `true_cfg_scale` above 1.
          true_cfg_scale: strength of that; above 1 each step costs two passes. Without a negative
            prompt it has no effect.
          height, width: pixels, multiples of 16 for FLUX.1; the model's own size by default.
          num_inference_steps: by default 28, or 4 for a model without guidance embedding (schnell).
          guidance_scale: input of guidance-distilled models (dev); others ignore it.
          num_images_per_prompt: images of each prompt.
          max_sequence_length: T5 tokens of a prompt, padding included; the model's own by default,
            or as many as an encoded prompt has.
          seed: one for all, or a list or array of N; drawn at random by default. In [0, 2**32).
          key: instead of a seed, one typed JAX key for all or N.
          latents: instead of either, the initial noise as packed tokens (N, I, P).
          output_type: "pil", "np" for a float array in [0, 1], or "latent".
          return_latents: whether the output carries the clean latents too.
          batch_size: images drawn together, over all devices; by default one on each, or on each
            group of devices that share an image.
          callback: called after each step with (step from 0, number of steps, `Preview`), once for
            every batch of images.
          progress: whether to show a progress bar on stderr.

        Raises:
          UserError: an argument that cannot be used; names it and what would do.
        """
        arguments.choice("output_type", output_type, ("pil", "np", "latent"))
        for name, given in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if isinstance(given, PromptEmbeds):
                check_embeds(name, given, self.transformer.config, self.mesh)
        if isinstance(prompt, PromptEmbeds):
            # To which a negative prompt is encoded too.
            max_sequence_length = encoded_length(prompt, max_sequence_length)
        plan = self.plan(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            max_sequence_length=max_sequence_length,
            batch_size=batch_size,
            num_images_per_prompt=num_images_per_prompt,
        )
        rows, negative_rows = prompt_rows(prompt, negative_prompt, plan)
        seeds, noise = initial_noise(seed, key, latents, len(rows), plan)
        wanted = [(prompt, rows)]
        if negative_prompt is not None and negative_rows is not None:
            if isinstance(negative_prompt, PromptEmbeds):
                check_same_length(plan.max_sequence_length, negative_prompt)
            wanted.append((negative_prompt, negative_rows))
        prompts, *others = embed_rows(self.text_encoders, wanted, plan)
        negative = others[0] if others else None

        # Pictures as bytes as soon as they are there: those of all images may be many.
        pictures: list[Any] = []
        clean, tiled = [], []
        for indices, tokens in self._drawn(noise, prompts, negative, plan, callback, progress):
            if output_type != "latent":
                pixels = plan.height * plan.width
                # Once, for the record too: it depends on what memory is left.
                in_tiles = images.is_tiled_now(self.vae, pixels, self.vae_tiling)
                decoded = self._decode(tokens, plan, in_tiles)[: len(indices)]
                pictures += images.to_pil(decoded) if output_type == "pil" else [decoded]
                as_usual = in_tiles == images.is_tiled(pixels, None)
                tiled += [None if as_usual else in_tiles] * len(indices)
            if return_latents or output_type == "latent":
                clean.append(np.asarray(tokens)[: len(indices)])
        packed = np.concatenate(clean) if clean else None
        found: Any = pictures
        if output_type != "pil":
            found = packed if output_type == "latent" else np.concatenate(pictures)
        return FluxOutput(
            images=found,
            latents=packed,
            seeds=seeds,
            records=self._records(seeds, prompts, negative, plan, tiled or [None] * len(rows)),
        )

    def _drawn(
        self,
        noise: Callable[[Sequence[int]], Array],
        prompts: ImagePrompts,
        negative: ImagePrompts | None,
        plan: Plan,
        callback: Callback | None,
        progress: bool,
    ) -> Iterator[tuple[tuple[int, ...], Float[Array, "B I P"]]]:
        """Batch by batch, the indices of its images and their clean latents (and filling)."""
        count, steps, size = len(prompts.rows), plan.schedule.num_steps, plan.batch_size
        starts = range(0, count, size)
        with tqdm(total=steps * len(starts), disable=not progress, unit="step") as bar:
            for start in starts:
                indices = tuple(range(start, min(start + size, count)))
                # The last batch is filled up with its last image: one shape, one program.
                filled = indices + indices[-1:] * (size - len(indices))
                tokens = noise(filled)
                loop = denoise(
                    self.transformer,
                    plan.schedule,
                    tokens,
                    plan.grid,
                    prompts.take(filled),
                    guidance_scale=plan.guidance_scale,
                    negative=None if negative is None else negative.take(filled),
                    true_cfg_scale=plan.true_cfg_scale,
                    waiting=self._waiting,
                )
                for step, (upcoming, clean) in enumerate(loop):
                    # Waiting for the step before this one keeps the bar honest and the device
                    # busy: there is always one step in flight.
                    jax.block_until_ready(tokens)
                    tokens = upcoming
                    if callback is not None:
                        callback(step, steps, self._preview(clean, indices, plan))
                    bar.update()
                yield indices, tokens

    @no_mesh_set()
    def _decode(
        self, tokens: Array, plan: Plan, tiled: bool | None
    ) -> Float[np.ndarray, "B H W C"]:
        return images.decode(self.vae, tokens, plan.grid, tiled=tiled)

    def _preview(self, clean: Array, indices: tuple[int, ...], plan: Plan) -> Preview:
        return Preview(
            latents=clean[: len(indices)],
            indices=indices,
            decode=lambda tokens: self._decode(tokens, plan, self.vae_tiling),
        )

    def _records(
        self,
        seeds: tuple[int | None, ...],
        prompts: ImagePrompts,
        negative: ImagePrompts | None,
        plan: Plan,
        tiled: Sequence[bool | None],
    ) -> tuple[GenerationRecord, ...]:
        return tuple(
            GenerationRecord(
                prompt=prompts.text(i),
                seed=seed,
                num_inference_steps=plan.schedule.num_steps,
                height=plan.height,
                width=plan.width,
                max_sequence_length=prompts.embeds.prompt_embeds.shape[1],
                guidance_scale=plan.guidance_scale,
                negative_prompt=None if negative is None else negative.text(i),
                true_cfg_scale=1.0 if negative is None else plan.true_cfg_scale,
                batch_size=plan.device_batch_size,
                tiled=tiled[i],
                model=self.name,
                loras=self.loras,
                kernels=self.kernels,
                attention=self.attention,
                dtype=str(self.transformer.dtype),
                version=flux_jax.__version__,
                platform=self.transformer.device.platform,
            )
            for i, seed in enumerate(seeds)
        )
