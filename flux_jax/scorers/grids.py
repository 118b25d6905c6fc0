"""Pictures side by side in one file, without a gap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flux_jax.errors import UserError
from flux_jax.metadata import save_png


def write_grid(path: Path, parts: Sequence[Path], *, columns: int) -> None:
    """Put pictures of one size together, row by row; one that is newer than its parts stays.

    Args:
      path: of the PNG; its folder is made.
      parts: files, at least one.
      columns: pictures in a row.

    Raises:
      UserError: it cannot be written, or a part cannot be read.
    """
    try:
        newest = max(part.stat().st_mtime_ns for part in parts)
        if path.is_file() and path.stat().st_mtime_ns > newest:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = []
        for part in parts:
            with Image.open(part) as picture:
                pictures.append(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"cannot make {path}: {error}") from error
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, -(-len(parts) // columns) * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    save_png(grid, path)
