"""Any checkpoint to a ternary one by rounding, without training, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert import hub
from convert.replaceable import check_apart, check_target, staged_folder
from convert.tensors import BFLOAT16
from flux_jax.errors import UserError
from ternary.config import QuantConfig
from ternary.policy import Coverage, Policy, coverage, select
from ternary.storage.format import CODES, WEIGHT, linears_in
from ternary.storage.pack import quantize_weight
from ternary.storage.saving import write_transformer
from ternary.storage.source import open_dense_pipeline


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    quant: QuantConfig | None = None,
    policy: Policy | None = None,
    *,
    force: bool = False,
    on_start: Callable[[int], None] = lambda nbytes: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Coverage:
    """Round the linears of a transformer; copy everything else.

    On the host there is one tensor at a time.

    Args:
      src: folder, file, hub id or a shipped model's name, as for `load_checkpoint`.
      dst: folder to be made, in diffusers' layout; it appears complete or not at all.
      quant: how the weights are rounded; by default as `QuantConfig()`.
      policy: which; by default all linears of all blocks.
      force: replace an existing checkpoint, once the new one is whole.
      on_start: told the bytes of the transformer's weights in bf16.
      on_bytes: told the bytes of each one that was handled.

    Returns:
      How much of the transformer is ternary.

    Raises:
      UserError: anything wrong with the source or the target.
    """
    quant, policy = quant or QuantConfig(), policy or Policy()
    if quant.rank:
        raise UserError("rounding without training makes no low-rank branch; rank must be 0")
    dst = hub.local_path(dst)
    check_target(dst, force=force)
    with open_dense_pipeline(src) as pipeline:
        check_apart(pipeline.path, dst)
        shapes = pipeline.shapes
        layers = select(linears_in(shapes), policy)
        chosen = set(layers)
        on_start(sum(2 * math.prod(shape) for shape in shapes.values()))
        errors: dict[str, float] = {}

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            for name, shape in shapes.items():
                values = pipeline.read(name)
                layer = name.removesuffix(WEIGHT)
                if name.endswith(WEIGHT) and layer in chosen:
                    done = quantize_weight(values, quant.granularity, quant.refit_steps, what=name)
                    errors[layer] = done.relative_error
                    yield layer + CODES, done.data
                    yield f"{layer}.scale", done.scale
                else:
                    yield name, values.astype(BFLOAT16, copy=False)
                on_bytes(2 * math.prod(shape))

        with staged_folder(dst, force=force) as stage:
            pipeline.write_rest(stage)
            write_transformer(
                stage / "transformer", pipeline.config, quant, layers, tensors(), errors
            )
        return coverage(shapes, layers)
