"""The same computations by PyTorch: diffusers and transformers, one component at a time.

Used by `compare` alone. torch is no dependency of this package: it is imported by name, when a
`Reference` is made. Everything goes in and comes out as NumPy, and a model is gone when its
function has returned.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Float, Int

Method = TypeVar("Method", bound=Callable[..., Any])


def _freeing(method: Method) -> Method:
    """The method; what it made is gone when it has returned, though models are in cycles."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch: Any = import_module("torch")
        try:
            with torch.no_grad():
                return method(*args, **kwargs)
        finally:
            gc.collect()
            # torch keeps freed memory of a GPU for itself, which the other side needs.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return cast(Method, call)


class Reference:
    """The torch side of a comparison.

    Attributes:
      path: a folder in diffusers' layout.
      dtype: "float32" or "bfloat16".
      device: "cuda" if torch has one, else "cpu".
    """

    def __init__(self, path: Path, dtype: str):
        self.torch: Any = import_module("torch")
        self.diffusers: Any = import_module("diffusers")
        self.transformers: Any = import_module("transformers")
        self.path = path
        self.dtype = getattr(self.torch, dtype)
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        # Their advice to the users of torch is none to ours.
        self.diffusers.utils.logging.set_verbosity_error()
        self.diffusers.utils.logging.disable_progress_bar()
        self.transformers.utils.logging.set_verbosity_error()
        self.transformers.utils.logging.disable_progress_bar()

    def _model(self, model_class: Any, component: str) -> Any:
        name = "dtype" if model_class.__module__.startswith("transformers") else "torch_dtype"
        model = model_class.from_pretrained(
            self.path / component, local_files_only=True, **{name: self.dtype}
        )
        return model.to(self.device).eval()

    def _tensor(self, array: np.ndarray) -> Any:
        tensor = self.torch.from_numpy(np.array(array)).to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @_freeing
    def clip(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B V"]:
        """CLIP's pooled embedding."""
        model = self._model(self.transformers.CLIPTextModel, "text_encoder")
        return _numpy(model(self._tensor(ids.astype(np.int64))).pooler_output)

    @_freeing
    def t5(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T C"]:
        """T5's last hidden states."""
        model = self._model(self.transformers.T5EncoderModel, "text_encoder_2")
        return _numpy(model(self._tensor(ids.astype(np.int64))).last_hidden_state)

    def sigmas(self, steps: int, image_tokens: int) -> Float[np.ndarray, " S"]:
        """The noise levels, set as `diffusers.FluxPipeline` sets them."""
        scheduler = self._scheduler()
        config = scheduler.config
        pipeline: Any = import_module("diffusers.pipelines.flux.pipeline_flux")
        points = (config.base_image_seq_len, config.max_image_seq_len)
        mu = pipeline.calculate_shift(image_tokens, *points, config.base_shift, config.max_shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas.numpy()

    @_freeing
    def transformer(
        self,
        noise: Float[np.ndarray, "B I P"],
        grid: tuple[int, int],
        prompt_embeds: Float[np.ndarray, "B T C"],
        pooled_prompt_embeds: Float[np.ndarray, "B V"],
        *,
        times: tuple[float, ...],
        guidance: float,
        steps: int,
        side: int,
    ) -> tuple[list[Float[np.ndarray, "B I P"]], Float[np.ndarray, "B I P"]]:
        """The velocities of `noise` at some times, and the latents of a whole sampling run.

        Args:
          noise: packed.
          grid: image tokens (rows, columns).
          prompt_embeds, pooled_prompt_embeds: from T5 and CLIP.
          times: noise levels in [0, 1].
          guidance: ignored by a model without guidance embedding.
          steps: of the sampling run.
          side: pixels of an image token.
        """
        rows, columns = grid
        ids = np.zeros((rows, columns, 3), np.float32)
        ids[..., 1] += np.arange(rows)[:, None]
        ids[..., 2] += np.arange(columns)[None, :]
        txt_ids = np.zeros((prompt_embeds.shape[1], 3), np.float32)
        prompt = self._tensor(prompt_embeds)
        pooled = self._tensor(pooled_prompt_embeds)
        model = self._model(self.diffusers.FluxTransformer2DModel, "transformer")
        guided = model.config.guidance_embeds
        velocities = [
            model(
                hidden_states=self._tensor(noise),
                encoder_hidden_states=prompt,
                pooled_projections=pooled,
                timestep=self.torch.full((len(noise),), time, device=self.device),
                guidance=self.torch.full((len(noise),), guidance, device=self.device)
                if guided
                else None,
                img_ids=self._tensor(ids.reshape(-1, 3)),
                txt_ids=self._tensor(txt_ids),
                return_dict=False,
            )[0]
            for time in times
        ]
        pipe = self.diffusers.FluxPipeline(
            scheduler=self._scheduler(),
            transformer=model,
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
        )
        pipe.vae_scale_factor = side // 2
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            prompt_embeds=prompt,
            pooled_prompt_embeds=pooled,
            latents=self._tensor(noise),
            height=rows * side,
            width=columns * side,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        return [_numpy(velocity) for velocity in velocities], _numpy(latents)

    @_freeing
    def vae(
        self, image: Float[np.ndarray, "B H W C"], latents: Float[np.ndarray, "B h w Z"]
    ) -> tuple[Float[np.ndarray, "B h w Z"], Float[np.ndarray, "B H W C"]]:
        """The mean latents of an image, unscaled, and the image of some scaled latents.

        Images are in [-1, 1].
        """
        model = self._model(self.diffusers.AutoencoderKL, "vae")
        pixels = self._tensor(image.transpose(0, 3, 1, 2))
        mean = model.encode(pixels).latent_dist.mode()
        raw = self._tensor(latents.transpose(0, 3, 1, 2)) / model.config.scaling_factor
        decoded = model.decode(raw + model.config.shift_factor, return_dict=False)[0]
        return _numpy(mean).transpose(0, 2, 3, 1), _numpy(decoded).transpose(0, 2, 3, 1)

    def _scheduler(self) -> Any:
        folder = self.path / "scheduler"
        return self.diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder)


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.float().cpu().numpy()
