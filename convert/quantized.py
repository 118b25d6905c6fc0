"""Components whose `config.json` has a `quantization_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flux_jax.errors import UserError

KEY = "quantization_config"


def open_quantized(name: str, folder: Path, raw: dict[str, Any]) -> Any:
    """A reader of a component's dense parameters, which can also load the packed module.

    Args:
      name: of the component.
      folder: where it is.
      raw: its `config.json`.

    Raises:
      UserError: quantised by another program, or damaged.
    """
    # Late: without such a checkpoint nothing of `ternary` is needed.
    from ternary.storage.checkpoint import TernaryCheckpoint
    from ternary.storage.format import METHOD

    described = raw[KEY]
    method = described.get("quant_method") if isinstance(described, dict) else None
    if name != "transformer" or method != METHOD:
        raise UserError(
            f"{folder}: a {name} quantised by {ascii(method)[:60]} is not read; expected weights "
            f"without {KEY}, or a transformer with quant_method {METHOD!r}"
        )
    return TernaryCheckpoint(folder)
