"""DPG-Bench's layout: one picture a prompt, of two by two, named as the prompt.

Read from README.md, dpg_bench/dist_eval.sh and dpg_bench/compute_dpg_bench.py of the scorer (see
`DPGBench.source`), which cuts the picture into squares of its resolution, row by row, and looks the
prompt up by what stands before the first `.` of the name.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.files import read_text
from flux_jax.scorers.grids import write_grid
from flux_jax.scorers.layout import Item, Layout

COLUMNS = 2


class DPGBench(Layout):
    """`images/{name}.png`, made of `parts/{name}-0.png` ..., which the scorer does not see."""

    title = "DPG-Bench"
    samples = 4
    source = "TencentQQGYLab/ELLA@3c228f1dc6c4d3cad0a47493816151a419f14db3"
    square = True

    def read(self, path: Path) -> list[Item]:
        """The folder `dpg_bench/prompts` of text files, or `dpg_bench.csv`."""
        items = _from_folder(path) if path.is_dir() else _from_csv(path)
        for item in items:
            if "." in item.name or "/" in item.name or not item.name:
                raise UserError(f"{path}: {item.name!r} is no name that DPG-Bench can look up")
        return items

    def check(self, samples: int) -> None:
        if samples > 4:
            raise UserError(f"DPG-Bench looks at 4 pictures a prompt at most, got {samples}")

    def file(self, index: int, item: Item, sample: int, samples: int) -> str:
        del index, samples
        return f"parts/{item.name}-{sample}.png"

    def finish(self, folder: Path, item: Item, parts: Sequence[Path]) -> None:
        columns = min(len(parts), COLUMNS)
        write_grid(folder / "images" / f"{item.name}.png", parts, columns=columns)

    def commands(self, folder: Path, prompts: Path, *, samples: int, side: int) -> list[str]:
        del prompts
        images = shlex.quote(str(folder / "images"))
        return [f"PIC_NUM={samples} bash dpg_bench/dist_eval.sh {images} {side}"]


def _from_folder(path: Path) -> list[Item]:
    files = sorted(path.glob("*.txt"))
    if not files:
        raise UserError(f"{path} has no .txt file; expected DPG-Bench's dpg_bench/prompts")
    items = []
    for file in files:
        prompt = read_text(file).strip()
        if not prompt:
            raise UserError(f"{file}, line 1: is empty; expected a prompt")
        items.append(Item(name=file.stem, prompt=prompt))
    return items


def _from_csv(path: Path) -> list[Item]:
    """The first row of each item; the others are further questions about it."""
    rows = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    items: dict[str, Item] = {}
    try:
        if not {"item_id", "text"} <= set(rows.fieldnames or ()):
            raise UserError(f"{path}, line 1: needs the columns item_id and text of dpg_bench.csv")
        for row in rows:
            name, prompt = (row["item_id"] or "").strip(), (row["text"] or "").strip()
            if not name or not prompt:
                raise UserError(f"{path}, line {rows.line_num}: has no item_id or no text")
            before = items.setdefault(name, Item(name=name, prompt=prompt))
            if before.prompt != prompt:
                raise UserError(f"{path}, line {rows.line_num}: another text for item {name!r}")
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: is no CSV: {error}") from None
    if not items:
        raise UserError(f"{path}, line 2: is missing; expected a prompt")
    return list(items.values())
