"""What a ternary checkpoint holds, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flux_jax.assets import resolve
from ternary.policy import coverage
from ternary.storage.checkpoint import TernaryCheckpoint, open_checkpoint
from ternary.storage.format import CODES, Stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One ternary linear.

    Attributes:
      name: its path in the transformer.
      shape: of its dense weight, (N, K).
      zeros: share of its weights that are 0.
      scale: mean of its scales.
      relative_error: `norm(w - ternary) / norm(w)` where it was rounded from a dense weight.
      bits: stored bits per weight, scales and low-rank branch included, bias not.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    scale: float
    relative_error: float | None
    bits: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A whole transformer.

    Attributes:
      granularity, activation_bits, rank: as in `QuantConfig`.
      parameters: of the dense model.
      ternary_fraction: share of them that is ternary.
      zeros: share of the ternary weights that are 0.
      nbytes: of the stored tensors.
      bits_per_parameter: `nbytes` over all parameters.
      smaller: the dense model's bytes in bf16 over `nbytes`.
      layers: its ternary linears, in the order of the model.
    """

    granularity: str
    activation_bits: int
    rank: int
    parameters: int
    ternary_fraction: float
    zeros: float
    nbytes: int
    bits_per_parameter: float
    smaller: float
    layers: tuple[LayerReport, ...]

    @property
    def summary(self) -> str:
        """How many layers of which kind, in words."""
        rank = f", a low-rank branch of rank {self.rank}" if self.rank else ""
        return (
            f"{len(self.layers)} ternary layers: W1.58A{self.activation_bits}, a scale per "
            f"{self.granularity}{rank}"
        )


def inspect_checkpoint(
    folder: str | Path, *, on_layer: Callable[[int], None] = lambda total: None
) -> Report:
    """Read a ternary checkpoint and count; every ternary tensor's checksum and digits are checked.

    Args:
      folder: of the pipeline, or of its transformer; or a shipped model's name.
      on_layer: told the number of layers before each one.

    Raises:
      UserError: not a ternary checkpoint, or a damaged one.
    """
    with open_checkpoint(Path(resolve(folder))) as checkpoint:
        layers = []
        for name in checkpoint.layers:
            on_layer(len(checkpoint.layers))
            layers.append(_layer(checkpoint, name))
        counted = coverage(checkpoint.shapes, checkpoint.layers)
        nbytes = sum(_nbytes(stored) for stored in checkpoint.stored.values())
        quant = checkpoint.description.quant
        return Report(
            granularity=quant.granularity,
            activation_bits=quant.activation_bits,
            rank=quant.rank,
            parameters=counted.total,
            ternary_fraction=counted.fraction,
            zeros=sum(layer.zeros * math.prod(layer.shape) for layer in layers)
            / max(counted.ternary, 1),
            nbytes=nbytes,
            bits_per_parameter=8 * nbytes / counted.total,
            smaller=2 * counted.total / nbytes,
            layers=tuple(layers),
        )


def _layer(checkpoint: TernaryCheckpoint, name: str) -> LayerReport:
    codes = checkpoint.codes(name)
    rows, columns = codes.shape
    own = (CODES, ".scale", ".low_rank_a", ".low_rank_b")
    nbytes = sum(_nbytes(checkpoint.stored[name + s]) for s in own if name + s in checkpoint.stored)
    scale = checkpoint.read(f"{name}.scale").astype(np.float32)
    return LayerReport(
        name=name,
        shape=(rows, columns),
        zeros=np.count_nonzero(codes == 1) / codes.size,
        scale=float(scale.mean()),
        relative_error=checkpoint.description.relative_error.get(name),
        bits=8 * nbytes / codes.size,
    )


def _nbytes(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def table(report: Report) -> list[str]:
    """A report as lines of text."""
    width = max((len(layer.name) for layer in report.layers), default=5)
    lines = [f"{'layer':{width}}  {'shape':>13}  {'zeros':>6}  {'scale':>9}  {'error':>6}  bits"]
    for layer in report.layers:
        error = "-" if layer.relative_error is None else f"{layer.relative_error:.4f}"
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        lines.append(
            f"{layer.name:{width}}  {shape:>13}  {layer.zeros:6.1%}  {layer.scale:9.6f}  "
            f"{error:>6}  {layer.bits:.3f}"
        )
    large = report.nbytes >= 1e9
    size = f"{report.nbytes / 1e9:.2f} GB" if large else f"{report.nbytes / 1e6:.2f} MB"
    lines += [
        "",
        report.summary,
        f"{report.ternary_fraction:.2%} of {report.parameters:,} parameters are ternary, "
        f"{report.zeros:.1%} of those are 0",
        f"{size} of tensors, {report.bits_per_parameter:.3f} bits a parameter, "
        f"{report.smaller:.2f} times smaller than bf16",
    ]
    return lines
