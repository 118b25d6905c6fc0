"""GenEval's layout: a numbered folder for each line of its metadata.

Read from README.md and evaluation/evaluate_images.py of the scorer (see `GenEval.source`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.files import write_whole
from flux_jax.json_values import parse_json
from flux_jax.scorers.grids import write_grid
from flux_jax.scorers.layout import Item, Layout, lines_of


class GenEval(Layout):
    """`00000/metadata.jsonl` (one line), `00000/samples/0000.png` ..., `00000/grid.png`."""

    title = "GenEval"
    samples = 4
    source = "djghosh13/geneval@af4902f24d3ca90ebbb446dd9891a59e0f82725f"

    def read(self, path: Path) -> list[Item]:
        """`evaluation_metadata.jsonl`: a JSON object a line, with tag, include and prompt."""
        items = []
        for number, line in enumerate(lines_of(path), 1):
            entry = parse_json(line, f"{path}, line {number}")
            if not isinstance(entry, dict):
                raise UserError(f"{path}, line {number}: must be a JSON object, got {line[:40]!r}")
            for name, kind in (("tag", str), ("include", list), ("prompt", str)):
                if not isinstance(entry.get(name), kind) or not entry[name]:
                    raise UserError(
                        f"{path}, line {number}: needs {name!r}, as in GenEval's "
                        f"evaluation_metadata.jsonl; it has {', '.join(entry) or 'nothing'}"
                    )
            items.append(Item(name=f"{number - 1:05d}", prompt=entry["prompt"], metadata=entry))
        return items

    def file(self, index: int, item: Item, sample: int, samples: int) -> str:
        del index, samples
        return f"{item.name}/samples/{sample:04d}.png"

    def finish(self, folder: Path, item: Item, parts: Sequence[Path]) -> None:
        place = folder / item.name
        write_whole(place / "metadata.jsonl", json.dumps(item.metadata).encode())
        write_grid(place / "grid.png", parts, columns=len(parts))

    def commands(self, folder: Path, prompts: Path, *, samples: int, side: int) -> list[str]:
        del prompts, samples, side
        results = shlex.quote(str(folder / "results.jsonl"))
        return [
            f"python evaluation/evaluate_images.py {shlex.quote(str(folder))} "
            f'--outfile {results} --model-path "<OBJECT_DETECTOR_FOLDER>"',
            f"python evaluation/summary_scores.py {results}",
        ]
