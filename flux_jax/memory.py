"""How much device memory each stage of the pipeline needs, known before anything is loaded.

A stage needs its own weights and intermediate values, and beside them lie the weights of the other
components that are on the device at that time. Asks the compiler for its plan of each stage's own program, on the device at hand. What else takes
memory (the runtime's context, the allocator's fragments) comes on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flux_jax import arguments
from flux_jax.denoise import CHUNK, MODULATIONS, VELOCITY
from flux_jax.encoding import T5_BIAS, T5_BLOCK, T5_EMBED
from flux_jax.functional import BoundFunction
from flux_jax.images import TILE, UNPACK_DECODE, WHOLE_DECODE_PIXELS, is_tiled
from flux_jax.latents import PATCH
from flux_jax.plan import Plan
from flux_jax.prompts import CLIP
from flux_jax.residence import OFFLOADED, RESIDENT, STREAMED, modulation_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageMemory:
    """One stage's need, in bytes.

    Attributes:
      weights: of its component, as far as they are on the device at the same time.
      work: inputs, results and intermediate values.
      held: weights of the other components, and what else waits for a later stage.
    """

    weights: int
    work: int
    held: int = 0

    @property
    def peak(self) -> int:
        return self.weights + self.work + self.held


def stage_memory(
    models: Mapping[str, Any],
    plan: Plan,
    *,
    tiled: bool | None = None,
    text_encoders: str = STREAMED,
    offload_modulation: bool = False,
) -> dict[str, StageMemory]:
    """The need of each stage of a call.

    Compiles every stage for the device at hand: about a minute for FLUX.1 at full size.

    Args:
      models: the four components by name; shapes alone are enough.
      plan: sizes of the call.
      tiled: as in `flux_jax.images.decode`.
      text_encoders: "resident", "offloaded" or "streamed", as in `FluxPipeline.from_pretrained`.
      offload_modulation: as there.

    Raises:
      UserError: another placement.
    """
    arguments.choice("text_encoders", text_encoders, (RESIDENT, OFFLOADED, STREAMED))
    shape, batch = jax.ShapeDtypeStruct, plan.batch_size
    transformer, vae = models["transformer"], models["vae"]
    tokens = models["text_encoder"].config.max_position_embeddings
    clip = CLIP.bind(models["text_encoder"])
    clip_ids = shape((batch, tokens), jnp.int32)
    clip_need = _need(clip, clip_ids)
    pooled = _outputs(clip, clip_ids)
    t5_need, states = _t5_need(models["text_encoder_2"], plan, streamed=text_encoders == STREAMED)

    guidance = None if plan.guidance_scale is None else shape((), jnp.float32)
    times = shape((CHUNK,), jnp.float32)
    scheduled = MODULATIONS.bind(transformer)
    mods = _outputs(scheduled, times, pooled, guidance)
    step = (
        shape((batch, *plan.token_shape), jnp.float32),
        shape((plan.token_shape[0], 3), jnp.int32),
        states,
        shape((plan.max_sequence_length, 3), jnp.int32),
        shape(mods.shape[1:], mods.dtype),
    )
    chunks = math.ceil(plan.schedule.num_steps / CHUNK)
    denoise = _need(VELOCITY.bind(transformer), *step)
    away = sum(_weights(layer) for layer in modulation_layers(transformer))
    away = away if offload_modulation else 0

    image = denoise.weights - away + _weights(vae)
    kept = clip_need.weights + t5_need.weights if text_encoders == RESIDENT else 0
    embeds = _bytes((states, pooled))
    decode = _decode_need(vae, plan, tiled)
    return {
        "encode (CLIP)": _beside(clip_need, image + t5_need.weights + _bytes(states)),
        "encode (T5)": _beside(t5_need, image + clip_need.weights),
        "modulations": _beside(
            _need(scheduled, times, pooled, guidance),
            _weights(vae) + kept + embeds + (chunks - 1) * _bytes(mods),
        ),
        # The modulation vectors of all steps lie there throughout.
        "denoise": StageMemory(
            weights=denoise.weights - away,
            work=denoise.work + chunks * _bytes(mods),
            held=_weights(vae) + kept + embeds,
        ),
        "decode": _beside(decode, denoise.weights - away + kept + embeds),
    }


def _t5_need(encoder: Any, plan: Plan, *, streamed: bool) -> tuple[StageMemory, Any]:
    """T5's need, and the shape of its result."""
    ids = jax.ShapeDtypeStruct((plan.batch_size, plan.max_sequence_length), jnp.int32)
    bias = T5_BIAS.bind(
        encoder.relative_attention_bias, config=encoder.config, length=plan.max_sequence_length
    )
    embed, block = T5_EMBED.bind(encoder.token_embedding), T5_BLOCK.bind(encoder.blocks[0])
    states, added = _outputs(embed, ids), _outputs(bias)
    need = _need(block, states, added)
    if streamed:
        # One block computes while the next arrives.
        ends = _weights(encoder.relative_attention_bias) + _weights(encoder.final_norm)
        return dataclasses.replace(need, weights=2 * need.weights + ends), states
    return dataclasses.replace(need, weights=_weights(encoder)), states


def _beside(need: StageMemory, held: int) -> StageMemory:
    return dataclasses.replace(need, held=held)


def _decode_need(vae: Any, plan: Plan, tiled: bool | None) -> StageMemory:
    pixels = plan.height * plan.width
    rows, columns = plan.grid
    together = min(plan.batch_size, max(1, WHOLE_DECODE_PIXELS // pixels))
    if is_tiled(pixels, tiled):
        rows, columns = (min(side, TILE // PATCH) for side in plan.grid)
        together = 1
    tokens = (together, rows * columns, plan.token_shape[1])
    function = UNPACK_DECODE.bind(vae, rows=rows, columns=columns)
    return _need(function, jax.ShapeDtypeStruct(tokens, jnp.float32))


def _outputs(function: BoundFunction, *args: Any) -> Any:
    """The shapes of a function's results."""
    return jax.eval_shape(function.program, function.leaves, args)


def _need(function: BoundFunction, *args: Any) -> StageMemory:
    # All of the component is there, though the program may not use it all.
    work = _bytes(args) + function.work_bytes(*args)
    return StageMemory(weights=_bytes(function.leaves), work=work)


def _weights(module: nnx.Module) -> int:
    return _bytes(nnx.state(module))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
