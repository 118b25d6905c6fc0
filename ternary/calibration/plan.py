"""What a calibration trains, and whether its inputs fit: decided before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from convert.transforms import Shape
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from ternary.calibration.streaming import part_name, parts_of
from ternary.config import CalibrateConfig
from ternary.distillation.step import PromptSet
from ternary.policy import Policy, select
from ternary.quantize import check_rank
from ternary.storage.format import WEIGHT, linears_in


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
      layers: of every part, by name: its ternary linears' paths within it.
      trained: names of the parts that are trained, in order.
    """

    layers: dict[str, tuple[str, ...]]
    trained: tuple[str, ...]


def make_plan(
    model: FluxConfig,
    shapes: Mapping[str, Shape],
    policy: Policy,
    config: CalibrateConfig,
    *,
    rank: int = 0,
) -> Plan:
    """Which parts of a transformer are trained, and which linears of each are ternary.

    Args:
      model: the transformer's hyper-parameters.
      shapes: of its parameters.
      policy: which linears are ternary.
      config: which blocks are trained.
      rank: of the branch beside each ternary weight.

    Raises:
      UserError: a pattern that matches nothing, a block that is not there or has nothing ternary,
        or a rank beyond a weight.
    """
    parts = parts_of(model)
    chosen = select(linears_in(shapes), policy)
    for name in chosen:
        check_rank(rank, shapes[name + WEIGHT])
    layers = {
        part.name: tuple(
            name.removeprefix(part.prefix) for name in chosen if part_name(name) == part.name
        )
        for part in parts
    }
    able = [part.name for part in parts if layers[part.name]]
    blocks = config.blocks
    if blocks is None:
        return Plan(layers, tuple(able))
    if isinstance(blocks, int):
        # Embedders and the final layer are no blocks, ternary or not.
        counted = [p.name for p in parts if p.kind in ("double", "single") and p.name in able]
        if blocks > len(counted):
            raise UserError(
                f"blocks must be at most {len(counted)}, the blocks with ternary linears, got "
                f"{blocks}"
            )
        return Plan(layers, tuple(counted[:blocks]))
    strangers = [name for name in blocks if name not in able]
    if strangers:
        raise UserError(
            f"blocks: {strangers[0]!r} is no part with ternary linears; there are {able[0]} to "
            f"{able[-1]}"
        )
    return Plan(layers, tuple(name for name in able if name in blocks))


def check_prompts(config: FluxConfig, prompts: PromptSet) -> None:
    """Refuse encoded prompts that are not this model's.

    Raises:
      UserError: no prompt, or other widths.
    """
    expected = (config.context_in_dim, config.vec_in_dim)
    found = (prompts.txt.shape[-1], prompts.pooled.shape[-1])
    if not len(prompts.txt) or len(prompts.txt) != len(prompts.pooled):
        raise UserError(
            f"prompts: {len(prompts.txt)} embeddings and {len(prompts.pooled)} pooled ones, "
            "expected as many of one as of the other, and at least one"
        )
    if found != expected:
        raise UserError(
            f"prompts have widths {found[0]} and {found[1]} (pooled), expected {expected[0]} and "
            f"{expected[1]}; encode them with the teacher's own text encoders"
        )
