"""How much device memory each stage of the pipeline needs, known before anything is loaded.

Asks the compiler for its plan of each stage's own program, on the device at hand. What else takes
memory (the runtime's context, the allocator's fragments) comes on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flux_jax.denoise import CHUNK, MODULATIONS, VELOCITY
from flux_jax.functional import BoundFunction
from flux_jax.images import TILE, UNPACK_DECODE, WHOLE_DECODE_PIXELS, is_tiled
from flux_jax.latents import PATCH
from flux_jax.plan import Plan
from flux_jax.prompts import CLIP, T5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageMemory:
    """One stage's need, in bytes.

    Attributes:
      weights: of its component.
      work: everything else at the same time: inputs, results, intermediate values.
    """

    weights: int
    work: int

    @property
    def peak(self) -> int:
        return self.weights + self.work


def stage_memory(
    models: Mapping[str, Any], plan: Plan, *, tiled: bool | None = None
) -> dict[str, StageMemory]:
    """The need of each stage, with only its own component on the device.

    Compiles every stage for the device at hand: about a minute for FLUX.1 at full size.

    Args:
      models: the four components by name; shapes alone are enough.
      plan: sizes of the call.
      tiled: as in `flux_jax.images.decode`.
    """
    shape, batch = jax.ShapeDtypeStruct, plan.batch_size
    tokens = models["text_encoder"].config.max_position_embeddings
    clip_ids = shape((batch, tokens), jnp.int32)
    t5_ids = shape((batch, plan.max_sequence_length), jnp.int32)
    encoders = CLIP.bind(models["text_encoder"]), T5.bind(models["text_encoder_2"])
    pooled, states = (
        _outputs(encoder, ids) for encoder, ids in zip(encoders, (clip_ids, t5_ids), strict=True)
    )
    guidance = None if plan.guidance_scale is None else shape((), jnp.float32)
    times = shape((CHUNK,), jnp.float32)
    scheduled = MODULATIONS.bind(models["transformer"])
    mods = _outputs(scheduled, times, pooled, guidance)
    step = (
        shape((batch, *plan.token_shape), jnp.float32),
        shape((plan.token_shape[0], 3), jnp.int32),
        states,
        shape((plan.max_sequence_length, 3), jnp.int32),
        shape(mods.shape[1:], mods.dtype),
    )
    chunks = math.ceil(plan.schedule.num_steps / CHUNK)
    denoise = _need(VELOCITY.bind(models["transformer"]), *step)
    return {
        "encode (CLIP)": _need(encoders[0], clip_ids),
        "encode (T5)": _need(encoders[1], t5_ids),
        "modulations": _need(scheduled, times, pooled, guidance),
        # The modulation vectors of all steps lie there throughout.
        "denoise": dataclasses.replace(denoise, work=denoise.work + chunks * _bytes(mods)),
        "decode": _decode_need(models["vae"], plan, tiled),
    }


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


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
