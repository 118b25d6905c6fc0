"""The ternary checkpoint on disk: names, shapes and `quantization_config` (docs/ternary_format.md).

A linear `P` of the dense model, whose weight is (N, K), is stored as

    P.ternary      U8   (N, ceil(K / 5))    base-3 bytes, `ternary.storage.base3`
    P.scale        F16  (), (N,) or (N, ceil(K / 128))
    P.bias         BF16 (N,)                as in the dense model
    P.low_rank_a   BF16 (R, K)              with a rank R > 0
    P.low_rank_b   BF16 (N, R)

and every other parameter as BF16 under its own name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from convert.problems import refusal
from convert.tensors import BFLOAT16, Spec
from convert.transforms import Shape
from flux_jax.errors import UserError
from pallas_kernels import GROUP
from ternary.config import QuantConfig, scale_shape
from ternary.storage.base3 import base3_width

METHOD = "flux_ternary"
VERSION = 1
CODES = ".ternary"
WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What `quantization_config` says.

    Attributes:
      quant: how the layers are quantised (of the fields that only training reads, the defaults).
      crc32: CRC-32 of each tensor's bytes, by stored name.
      relative_error: `norm(w - ternary) / norm(w)` of a layer, for those that were rounded from a
        dense weight.
    """

    quant: QuantConfig
    crc32: Mapping[str, int]
    relative_error: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The value of `quantization_config`."""
        return {
            "quant_method": METHOD,
            "format_version": VERSION,
            "granularity": self.quant.granularity,
            "group_size": GROUP,
            "activation_bits": self.quant.activation_bits,
            "rank": self.quant.rank,
            "relative_error": {k: float(f"{v:.4g}") for k, v in self.relative_error.items()},
            "crc32": {name: f"{value:08x}" for name, value in self.crc32.items()},
        }


def read_description(raw: Any, what: str) -> Description:
    """A `quantization_config`, checked.

    Args:
      raw: the JSON value.
      what: the file, for messages.

    Raises:
      UserError: another method or version, or a field missing or of another type.
    """
    if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
        found = raw.get("quant_method") if isinstance(raw, dict) else raw
        if found is None:
            raise UserError(f"{what}: says nothing of ternary weights: this model is dense")
        raise UserError(
            f"{what}: quantised by {ascii(found)[:60]}, expected quant_method {METHOD!r}"
        )
    if raw.get("format_version") != VERSION:
        raise UserError(
            f"{what}: ternary format version {ascii(raw.get('format_version'))[:20]}, this program "
            f"reads {VERSION}; update it, or quantise again"
        )
    if raw.get("group_size") != GROUP:
        raise UserError(
            f"{what}: group_size must be {GROUP}, got {ascii(raw.get('group_size'))[:20]}"
        )
    tables = {}
    for name in ("crc32", "relative_error"):
        tables[name] = raw.get(name)
        if not isinstance(tables[name], dict):
            raise UserError(f"{what}: quantization_config has no table `{name}`")
    try:
        fields: dict[str, Any] = {k: raw.get(k) for k in ("granularity", "activation_bits", "rank")}
        quant = QuantConfig(**fields)
        return Description(
            quant=quant,
            crc32={name: int(value, 16) for name, value in tables["crc32"].items()},
            relative_error={k: float(v) for k, v in tables["relative_error"].items()},
        )
    except UserError as error:
        raise UserError(f"{what}: quantization_config: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: quantization_config: a checksum or error is no number") from error


def linears_in(dense: Mapping[str, Shape]) -> list[str]:
    """The linears of a dense model, from the shapes of its parameters."""
    return [
        name.removesuffix(WEIGHT)
        for name, shape in dense.items()
        if name.endswith(WEIGHT) and len(shape) == 2
    ]


def layers_in(stored: Iterable[str]) -> list[str]:
    """The ternary linears, from the names of the stored tensors."""
    return [name.removesuffix(CODES) for name in stored if name.endswith(CODES)]


def expected_tensors(
    dense: Mapping[str, Shape], layers: Iterable[str], quant: QuantConfig
) -> dict[str, Spec]:
    """Every tensor of a checkpoint.

    Args:
      dense: shapes of the dense model's parameters.
      layers: paths of the ternary linears.
      quant: how they are quantised.

    Raises:
      UserError: a layer that is no linear of the model.
    """
    chosen = set(layers)
    strangers = sorted(name for name in chosen if len(dense.get(name + WEIGHT, ())) != 2)
    if strangers:
        raise UserError(f"tensor `{strangers[0]}{CODES}` belongs to no linear of this model")
    found: dict[str, Spec] = {}
    for name, shape in dense.items():
        layer = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or layer not in chosen:
            found[name] = Spec(shape, BFLOAT16)
            continue
        rows, columns = shape
        scale = scale_shape(quant.granularity, rows, columns)
        found[layer + CODES] = Spec((rows, base3_width(columns)), np.dtype(np.uint8))
        found[f"{layer}.scale"] = Spec(scale, np.dtype(np.float16))
        if quant.rank:
            found[f"{layer}.low_rank_a"] = Spec((quant.rank, columns), BFLOAT16)
            found[f"{layer}.low_rank_b"] = Spec((rows, quant.rank), BFLOAT16)
    return found


def check_tensors(found: Mapping[str, Spec], expected: Mapping[str, Spec], what: str) -> None:
    """Compare what is stored with what should be.

    Raises:
      UserError: all that is missing, left over or of another shape or dtype, in one report.
    """
    problems = [f"tensor `{name}` is missing" for name in expected if name not in found]
    problems += [f"tensor `{name}` is not expected" for name in found if name not in expected]
    for name, wanted in expected.items():
        if name in found and found[name] != wanted:
            problems.append(f"tensor `{name}` is {_show(found[name])}, expected {_show(wanted)}")
    if problems:
        raise refusal(what, problems)


def _show(spec: Spec) -> str:
    return f"{spec.dtype} {spec.shape}"
