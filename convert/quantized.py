"""What `ternary` writes into checkpoints: the one place where `convert` reaches for it, late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.files import read_json
from convert.safetensors_header import SUFFIX
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


def are_latents(folder: Path) -> bool:
    """Whether a folder holds latent weights of ours, and nothing else.

    Raises:
      UserError: its index cannot be read.
    """
    from ternary.storage.latents import FORMAT, INDEX

    index = folder / INDEX
    if not index.is_file() or read_json(index).get("format") != FORMAT:
        return False
    return all(
        entry.is_file() and (entry.name == INDEX or entry.suffix == SUFFIX)
        for entry in folder.iterdir()
    )
