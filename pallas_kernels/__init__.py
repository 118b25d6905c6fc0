"""Products with packed ternary weights: the public ops, the layout, and a plain-JAX reference.

Names are imported when they are first used: `python -m pallas_kernels --help` needs no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.api import normalize_and_quantize as normalize_and_quantize
    from pallas_kernels.api import quantize_activations as quantize_activations
    from pallas_kernels.api import quantize_columns as quantize_columns
    from pallas_kernels.api import ternary_matmul as ternary_matmul
    from pallas_kernels.backends import BACKENDS as BACKENDS
    from pallas_kernels.heads import Projection as Projection
    from pallas_kernels.heads import attention_heads as attention_heads
    from pallas_kernels.heads import grouped_heads as grouped_heads
    from pallas_kernels.packing import BLOCK_BYTES as BLOCK_BYTES
    from pallas_kernels.packing import BLOCK_CODES as BLOCK_CODES
    from pallas_kernels.packing import GROUP as GROUP
    from pallas_kernels.packing import group_count as group_count
    from pallas_kernels.packing import pack_codes as pack_codes
    from pallas_kernels.packing import packed_width as packed_width
    from pallas_kernels.packing import unpack_codes as unpack_codes
    from pallas_kernels.reference import Columns as Columns
    from pallas_kernels.reference import Quantized as Quantized

_HOME = {
    "BACKENDS": "backends",
    "BLOCK_BYTES": "packing",
    "BLOCK_CODES": "packing",
    "Columns": "reference",
    "GROUP": "packing",
    "Projection": "heads",
    "Quantized": "reference",
    "attention_heads": "heads",
    "group_count": "packing",
    "grouped_heads": "heads",
    "normalize_and_quantize": "api",
    "pack_codes": "packing",
    "packed_width": "packing",
    "quantize_activations": "api",
    "quantize_columns": "api",
    "ternary_matmul": "api",
    "unpack_codes": "packing",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
