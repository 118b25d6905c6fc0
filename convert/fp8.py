"""Checkpoints with float8 weights, read as ordinary floats.

Two kinds are in circulation, told apart by their scale tensors:

- plain: a weight is stored as float8 e4m3 or e5m2 and means its own value;
- scaled: beside `X.weight` stands a float32 scale, `X.scale_weight` (ComfyUI, with an empty marker
  tensor `scaled_fp8`) or `X.weight_scale`, for the tensor or for each row. The weight means
  `float32(weight) * scale`.

Either is computed in float32 and rounded once to the wanted dtype, to nearest, ties to even.
Scales of activations (`X.scale_input`, `X.input_scale`) belong to fp8 products; nothing here
multiplies in fp8, so they are left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from convert.tensors import (
    BFLOAT16,
    FLOAT32,
    FLOATS,
    Reader,
    Spec,
    cast_into,
    check_range,
    read_whole,
)
from flux_jax.errors import UserError
from flux_jax.json_values import parse_json

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_QUANT_NOTE = ".comfy_quant"
MARKER = "scaled_fp8"
_INPUT_REASON = "scale of the activations of an fp8 product, not used here"
MARKER_REASON = "marks a scaled fp8 checkpoint"


class _Weight(NamedTuple):
    """A float8 weight and its scale: a float32 array of one or of `rows` values, or None."""

    stored: Spec
    scale: np.ndarray | None


class Dequantized:
    """A reader of float8 weights as floats; other tensors pass through.

    Attributes:
      specs: the tensors without scales and markers; float8 ones have the wanted dtype.
      dropped: `(name, reason)` of the tensors left out.
    """

    def __init__(self, source: Reader, dtype: np.dtype | None, *, what: str):
        """Reads the scales; the weights are read later.

        Args:
          source: reader of the stored tensors.
          dtype: of the dequantised weights; None means bfloat16.
          what: for messages.

        Raises:
          UserError: a scale without its weight, the second of one weight, of a wrong shape, not
            finite, or with a weight that is not float8.
        """
        self._source, self._what = source, what
        self.dropped: list[tuple[str, str]] = []
        scales: dict[str, np.ndarray] = {}
        rest: dict[str, Spec] = {}
        for name, spec in source.specs.items():
            if name.endswith(_WEIGHT_SCALES):
                weight = _weight_of(source, name, what)
                if weight in scales:
                    raise UserError(f"{what}: tensor `{weight}` has two scales, expected one")
                scales[weight] = _read_scale(source, name, what)
            elif name.endswith(_INPUT_SCALES):
                self.dropped.append((name, _INPUT_REASON))
            elif name == MARKER or name.endswith("." + MARKER):
                self.dropped.append((name, MARKER_REASON))
            elif name.endswith(_QUANT_NOTE):
                _check_note(source, name, what)
                self.dropped.append((name, MARKER_REASON))
            else:
                rest[name] = spec
        self._weights = {
            name: _Weight(spec, scales.get(name))
            for name, spec in rest.items()
            if spec.dtype in FLOAT8
        }
        for name, (spec, scale) in self._weights.items():
            if scale is not None and scale.size not in (1, spec.rows):
                raise UserError(
                    f"{what}: the scale of tensor `{name}` has {scale.size} values, expected 1 or "
                    f"{spec.rows} (one a row)"
                )
        self.specs = {
            name: Spec(spec.shape, dtype or BFLOAT16) if name in self._weights else spec
            for name, spec in rest.items()
        }

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        weight = self._weights.get(name)
        if weight is None:
            self._source.read_into(name, row, out)
            return
        raw = np.empty(out.shape, weight.stored.dtype)
        self._source.read_into(name, row, raw)
        scale = weight.scale
        if scale is None or scale.size == 1:
            # A code has only 256 values: round the table, then look up.
            values = np.arange(256, dtype=np.uint8).view(raw.dtype).astype(FLOAT32)
            with np.errstate(invalid="ignore", over="ignore"):
                table = (values if scale is None else values * scale.reshape(())).astype(out.dtype)
            # As 16- or 32-bit integers: indexing ml_dtypes arrays is slow.
            bits = np.dtype(f"u{out.dtype.itemsize}")
            np.take(table.view(bits), raw.view(np.uint8), out=out.view(bits), mode="clip")
            if scale is not None:
                check_range(out, what=f"{self._what}: tensor `{name}`")
        else:
            part = scale.reshape(-1)[row : row + out.shape[0]]
            part = part.reshape(-1, *[1] * (out.ndim - 1))
            cast_into(raw.astype(FLOAT32) * part, out, what=f"{self._what}: tensor `{name}`")


def has_float8(reader: Reader) -> bool:
    """Whether any tensor is float8, or is the scale of one."""
    return any(
        spec.dtype in FLOAT8 or name.endswith(_WEIGHT_SCALES) for name, spec in reader.specs.items()
    )


def _weight_of(source: Reader, scale_name: str, what: str) -> str:
    """The weight that a scale belongs to."""
    layer = scale_name.rsplit(".", 1)[0]
    weight = f"{layer}.weight"
    if weight not in source.specs:
        raise UserError(f"{what}: tensor `{scale_name}` scales `{weight}`, which is missing")
    if source.specs[weight].dtype not in FLOAT8:
        raise UserError(
            f"{what}: tensor `{scale_name}` scales `{weight}`, which has dtype "
            f"{source.specs[weight].dtype}, expected float8"
        )
    return weight


def _read_scale(source: Reader, name: str, what: str) -> np.ndarray:
    spec = source.specs[name]
    if spec.dtype not in FLOATS or math.prod(spec.shape) not in (1, spec.rows):
        raise UserError(
            f"{what}: tensor `{name}` is no scale: dtype {spec.dtype}, shape {list(spec.shape)}; "
            "expected one float, or one for each row"
        )
    scale = read_whole(source, name).astype(FLOAT32)
    if not np.isfinite(scale).all():
        raise UserError(f"{what}: tensor `{name}` has scales that are not finite")
    return scale


def _check_note(source: Reader, name: str, what: str) -> None:
    """ComfyUI's note on a layer: JSON in bytes, naming the layer's format."""
    where = f"{what}: tensor `{name}`"
    unreadable = f"{where} is no readable quantisation note"
    note = parse_json(read_whole(source, name).tobytes(), unreadable)
    kind = note.get("format") if isinstance(note, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{unreadable}: it names no format")
    if not kind.startswith("float8"):
        raise UserError(f"{where} says format {ascii(kind)[:40]}, only float8 is read here")
