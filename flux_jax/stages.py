"""The compiled programs of a call, known from shapes alone: to plan memory, or to compile ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flux_jax.autoencoder import DECODE
from flux_jax.denoise import CHUNK, MODULATIONS, VELOCITY
from flux_jax.encoding import T5_BIAS, T5_BLOCK, T5_EMBED
from flux_jax.functional import BoundFunction, SplitModule
from flux_jax.images import TILE, UNPACK_DECODE, WHOLE_DECODE_PIXELS, is_tiled
from flux_jax.plan import Plan
from flux_jax.prompts import CLIP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One program and what it is called with, in shapes.

    Attributes:
      function: bound to a module, or to its shapes.
      args: of a call.
    """

    function: BoundFunction
    args: tuple[Any, ...]

    def outputs(self) -> Any:
        """The shapes of its results."""
        return jax.eval_shape(self.function.program, self.function.leaves, self.args)


def stages(models: Mapping[str, Any], plan: Plan, *, tiled: bool | None = None) -> dict[str, Stage]:
    """Every program of a call with one prompt and no negative one, by name.

    Args:
      models: the four components by name; shapes alone are enough.
      plan: sizes of the call.
      tiled: as in `flux_jax.images.decode`.
    """
    shape, batch, length = jax.ShapeDtypeStruct, plan.batch_size, plan.max_sequence_length
    tokens = models["text_encoder"].config.max_position_embeddings
    clip = Stage(
        function=CLIP.bind(models["text_encoder"]), args=(shape((batch, tokens), jnp.int32),)
    )
    pooled = clip.outputs()
    t5 = models["text_encoder_2"]
    bias = Stage(
        function=T5_BIAS.bind(t5.relative_attention_bias, config=t5.config, length=length), args=()
    )
    embed = Stage(
        function=T5_EMBED.bind(t5.token_embedding), args=(shape((batch, length), jnp.int32),)
    )
    states = embed.outputs()
    guidance = None if plan.guidance_scale is None else shape((), jnp.float32)
    transformer = SplitModule.of(models["transformer"])
    modulations = Stage(
        function=MODULATIONS.bind(transformer),
        args=(shape((CHUNK,), jnp.float32), pooled, guidance),
    )
    mods = modulations.outputs()
    denoise = Stage(
        function=VELOCITY.bind(transformer),
        args=(
            shape((batch, *plan.token_shape), jnp.float32),
            shape((plan.token_shape[0], 3), jnp.int32),
            states,
            shape((length, 3), jnp.int32),
            shape(mods.shape[1:], mods.dtype),
        ),
    )
    return {
        "encode (CLIP)": clip,
        "encode (T5)": Stage(function=T5_BLOCK.bind(t5.blocks[0]), args=(states, bias.outputs())),
        "modulations": modulations,
        "denoise": denoise,
        "decode": _decode(models["vae"], plan, tiled),
    }


def _decode(vae: Any, plan: Plan, tiled: bool | None) -> Stage:
    pixels = plan.height * plan.width
    if is_tiled(pixels, tiled):
        rows, columns = (min(side, TILE) for side in plan.latent_shape[:2])
        latents = jax.ShapeDtypeStruct((1, rows, columns, plan.latent_shape[2]), jnp.float32)
        return Stage(function=DECODE.bind(vae), args=(latents,))
    rows, columns = plan.grid
    together = min(plan.batch_size, max(1, WHOLE_DECODE_PIXELS // pixels))
    tokens = jax.ShapeDtypeStruct((together, *plan.token_shape), jnp.float32)
    return Stage(function=UNPACK_DECODE.bind(vae, rows=rows, columns=columns), args=(tokens,))


def lower_ahead(models: Mapping[str, Any], plan: Plan) -> list[Any]:
    """Trace and lower what a call will run, while its weights are still on their way.

    Args:
      models: abstract components by name, with the placement of their arrays (`place_shapes`).
      plan: the call.

    Returns:
      What `compile()` makes programs of, in the order of a call; a later call of the same shapes
      finds them. Compiling times kernels on the device, which should do nothing else then.
    """
    return [stage.function.lower(*stage.args) for stage in stages(models, plan).values()]
