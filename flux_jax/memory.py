"""How much device memory each stage of the pipeline needs, known before anything is loaded.

A stage needs its own weights and intermediate values, and beside them lie the weights of the other
components that are on the device at that time. Asks the compiler for its plan of each stage's own
program, on the device at hand. What else takes memory (the runtime's context, the allocator's
fragments) comes on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from flux_jax import arguments
from flux_jax.denoise import CHUNK
from flux_jax.plan import Plan
from flux_jax.residence import OFFLOADED, RESIDENT, STREAMED, modulation_layers
from flux_jax.stages import Stage, stages


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
        """All of it together."""
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
    transformer, vae, t5 = (models[name] for name in ("transformer", "vae", "text_encoder_2"))
    programs = stages(models, plan, tiled=tiled)
    needs = {name: _need(stage) for name, stage in programs.items()}
    clip_need, denoise = needs["encode (CLIP)"], needs["denoise"]
    t5_need = dataclasses.replace(
        needs["encode (T5)"], weights=_t5_weights(t5, streamed=text_encoders == STREAMED)
    )
    mods = _bytes(programs["modulations"].outputs())
    states = _bytes(programs["encode (T5)"].outputs())
    away = sum(_weights(layer) for layer in modulation_layers(transformer))
    away = away if offload_modulation else 0

    image = denoise.weights - away + _weights(vae)
    kept = clip_need.weights + t5_need.weights if text_encoders == RESIDENT else 0
    embeds = states + _bytes(programs["encode (CLIP)"].outputs())
    chunks = math.ceil(plan.schedule.num_steps / CHUNK)
    return {
        "encode (CLIP)": _beside(clip_need, image + t5_need.weights + states),
        "encode (T5)": _beside(t5_need, image + clip_need.weights),
        "modulations": _beside(
            needs["modulations"], _weights(vae) + kept + embeds + (chunks - 1) * mods
        ),
        # The modulation vectors of all steps lie there throughout.
        "denoise": StageMemory(
            weights=denoise.weights - away,
            work=denoise.work + chunks * mods,
            held=_weights(vae) + kept + embeds,
        ),
        "decode": _beside(needs["decode"], denoise.weights - away + kept + embeds),
    }


def _t5_weights(encoder: Any, *, streamed: bool) -> int:
    if not streamed:
        return _weights(encoder)
    # One block computes while the next arrives.
    ends = _weights(encoder.relative_attention_bias) + _weights(encoder.final_norm)
    return 2 * _weights(encoder.blocks[0]) + ends


def _beside(need: StageMemory, held: int) -> StageMemory:
    return dataclasses.replace(need, held=held)


def _need(stage: Stage) -> StageMemory:
    # All of the component is there, though the program may not use it all.
    work = _bytes(stage.args) + stage.function.work_bytes(*stage.args)
    return StageMemory(weights=_bytes(stage.function.leaves), work=work)


def _weights(module: nnx.Module) -> int:
    return _bytes(nnx.state(module))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
