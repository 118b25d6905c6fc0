"""What a ternary checkpoint holds, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from convert import hub
from convert.tensors import Spec
from convert.transforms import Shape
from flux_jax.assets import resolve
from pallas_kernels import unpack_codes
from ternary.config import QuantConfig
from ternary.layers import FakeTernaryLinear
from ternary.policy import coverage
from ternary.storage.checkpoint import open_checkpoint
from ternary.storage.format import CODES, expected_tensors
from ternary.storage.saving import stands_for, ternary_layers


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
    folder: str | Path | nnx.Module, *, on_layer: Callable[[int], None] = lambda total: None
) -> Report:
    """Read a ternary checkpoint and count; every ternary tensor's checksum and digits are checked.

    Args:
      folder: of the pipeline, or of its transformer; or a shipped model's name. Or a module in
        memory, a student in training among them: the sizes are those of its checkpoint.
      on_layer: told the number of layers before each one.

    Raises:
      UserError: not a ternary checkpoint, or a damaged one; a module without ternary linears, or
        with several kinds of them, or with LoRAs.
    """
    if isinstance(folder, nnx.Module):
        return _inspect_module(folder, on_layer)
    with open_checkpoint(hub.local_path(resolve(folder))) as checkpoint:
        layers = []
        for name in checkpoint.layers:
            on_layer(len(checkpoint.layers))
            scale = checkpoint.read(f"{name}.scale")
            error = checkpoint.description.relative_error.get(name)
            layers.append(_layer(name, checkpoint.codes(name), scale, checkpoint.stored, error))
        quant = checkpoint.description.quant
        return _report(quant, checkpoint.shapes, checkpoint.stored, layers)


def _inspect_module(module: nnx.Module, on_layer: Callable[[int], None]) -> Report:
    """As if it were stored."""
    found, quant = ternary_layers(module)
    shapes = stands_for(module, found)
    stored = expected_tensors(shapes, found, quant)
    layers = []
    for name, layer in found.items():
        on_layer(len(found))
        frozen = layer.freeze() if isinstance(layer, FakeTernaryLinear) else layer
        codes = np.asarray(unpack_codes(frozen.packed[...], frozen.in_features))
        layers.append(_layer(name, codes, np.asarray(frozen.scale[...]), stored, None))
    return _report(quant, shapes, stored, layers)


def _report(
    quant: QuantConfig,
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Spec],
    layers: Sequence[LayerReport],
) -> Report:
    counted = coverage(shapes, [layer.name for layer in layers])
    nbytes = sum(spec.nbytes for spec in stored.values())
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


def _layer(
    name: str,
    codes: UInt8[np.ndarray, "N K"],
    scale: Float[np.ndarray, "*scale"],
    stored: Mapping[str, Spec],
    relative_error: float | None,
) -> LayerReport:
    rows, columns = codes.shape
    own = (CODES, ".scale", ".low_rank_a", ".low_rank_b")
    nbytes = sum(stored[name + s].nbytes for s in own if name + s in stored)
    return LayerReport(
        name=name,
        shape=(rows, columns),
        zeros=np.count_nonzero(codes == 1) / codes.size,
        scale=float(scale.astype(np.float32).mean()),
        relative_error=relative_error,
        bits=8 * nbytes / codes.size,
    )


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
