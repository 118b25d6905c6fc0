"""Files that ship with the package."""

from __future__ import annotations

from pathlib import Path

from flux_jax.errors import UserError


def tiny_path() -> Path:
    """The folder of the model that ships with the package, in diffusers' layout.

    Raises:
      UserError: it was not installed.
    """
    folder = Path(__file__).parent / "tiny"
    if not (folder / "model_index.json").is_file():
        raise UserError(f"the model `tiny` is not installed: {folder} has no model_index.json")
    return folder
