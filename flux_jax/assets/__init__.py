"""The models that ship with the package: a trained FLUX of small size, and its 1.58-bit student."""

from __future__ import annotations

import re
from pathlib import Path

from flux_jax.errors import UserError

TEACHER, STUDENT = "tiny", "tiny-ternary"
# Folders beside this module, by the name a command takes.
SHIPPED = {TEACHER: "tiny", STUDENT: "tiny_ternary"}
DEFAULT_MODEL = STUDENT


# Of a repository on the Hugging Face hub.
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_name(model: str) -> bool:
    """Whether it may name a model that is no path: one that ships, or one on the hub."""
    return model in SHIPPED or REPO_ID.fullmatch(model) is not None


def resolve(model: str | Path) -> str | Path:
    """`model`; or, where no checkpoint of that name is on the disk, the shipped model's folder."""
    shipped = str(model) in SHIPPED and not _holds_checkpoint(Path(model))
    return shipped_path(str(model)) if shipped else model


def _holds_checkpoint(path: Path) -> bool:
    """Whether there is what `convert.source` looks for; a folder of pictures may have any name."""
    return path.is_dir() and any(
        file.name in ("model_index.json", "config.json") or file.suffix == ".safetensors"
        for file in path.iterdir()
    )


def shipped_path(name: str) -> Path:
    """The folder of a model that ships with the package, in diffusers' layout.

    Args:
      name: a key of `SHIPPED`.

    Raises:
      UserError: it was not installed.
    """
    folder = Path(__file__).parent / SHIPPED[name]
    if not (folder / "model_index.json").is_file():
        raise UserError(f"the model `{name}` is not installed: {folder} has no model_index.json")
    return folder
