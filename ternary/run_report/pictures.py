"""Pairs of pictures for the page, as small WebP images inside its text."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ternary.distillation.held_out import corner
from ternary.run_report.folder import Run, Sample
from ternary.run_report.scores import Evaluations

# What bounds the page: pairs of a gallery, looks at the student of each, and pixels of a picture's
# longer side.
PAIRS_SHOWN, VIEWS, LONGEST = 12, 6, 256
QUALITY = 82


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt as teacher and student draw it.

    Attributes:
      prompt, seed: what was drawn, from which noise.
      teacher: `data:` address of the picture.
      students: the same by view.
      notes: on the student's picture by view, as "21.3 dB".
      size: pixels (width, height) as shown.
    """

    prompt: str
    seed: int
    teacher: str
    students: dict[str, str]
    notes: dict[str, str]
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pairs of pictures that were drawn together.

    Attributes:
      title: above them.
      prompts: which ones they are of, as "held-out prompts".
      of: how many of those there are to choose from.
      choice: what stands before the choice of a view.
      views: names of the students with the label on their pictures, the one to begin with last.
      pairs: in order; each has all views.
    """

    title: str
    prompts: str
    of: int
    choice: str
    views: Mapping[str, str]
    pairs: tuple[Pair, ...]


def galleries(run: Run, evaluations: Evaluations) -> list[Gallery]:
    """What the run drew and what was scored, as far as there are pictures."""
    samples = [sample for sample in run.samples if sample.step <= run.steps]
    found = [_drawn([samples[i] for i in _spread(len(samples), VIEWS)])]
    if evaluations.complete:
        found.append(_scored(evaluations))
    return [gallery for gallery in found if gallery.pairs]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(most, count)).astype(int).tolist()))


def _drawn(samples: Sequence[Sample]) -> Gallery:
    """Pairs cut out of the run's grids, of which there are none if none is what its legend says."""
    pairs: dict[tuple[str, int], Pair] = {}
    views = []
    for sample in reversed(samples):
        cut = _cut(sample)
        if cut is None:
            continue
        view = f"step {sample.step:,}"
        views.insert(0, view)
        for key, (teacher, student, note) in cut.items():
            before = pairs.get(key)
            if before is None and len(views) == 1:
                before = pairs[key] = Pair(
                    prompt=key[0],
                    seed=key[1],
                    teacher=_data(teacher, LONGEST),
                    students={},
                    notes={},
                    size=_fit(teacher.size, LONGEST),
                )
            if before is not None:
                before.students[view] = _data(student, LONGEST)
                before.notes[view] = note
    whole = [pair for pair in pairs.values() if set(pair.students) == set(views)]
    chosen = tuple(whole[i] for i in _spread(len(whole), PAIRS_SHOWN))
    return Gallery(
        title="During the run",
        prompts="held-out prompts whose pictures the run kept",
        of=len(whole),
        choice="Student at",
        views=dict.fromkeys(views, "student"),
        pairs=chosen,
    )


def _cut(sample: Sample) -> dict[tuple[str, int], tuple[Image.Image, Image.Image, str]] | None:
    """(teacher, student, note) by (prompt, seed); None for a grid that cannot be read."""
    picture = _open(sample.picture)
    legend: Any = sample.legend
    try:
        height, width = int(legend["height"]), int(legend["width"])
        between = int(legend["gap"])
        shown = [(str(s["prompt"]), int(s["seed"]), float(s["psnr_db"])) for s in legend["shown"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if picture is None or not shown or min(height, width, between) < 1:
        return None
    found = {}
    for index, (prompt, seed, psnr) in enumerate(shown):
        top, left = corner(index, height, width, between)
        if left + 2 * width + between > picture.width or top + height > picture.height:
            return None
        both = [
            picture.crop((side, top, side + width, top + height))
            for side in (left, left + width + between)
        ]
        found[prompt, seed] = (*both, f"{psnr:.1f} dB")
    return found


def _scored(evaluations: Evaluations) -> Gallery:
    """Pictures of each category, with the detector's verdicts."""
    teacher, *others = evaluations.columns
    rows = [row for part in _by_category(teacher.images) for row in part]
    pairs = []
    for row in rows:
        entry = teacher.images[row]
        picture = _open(teacher.folder / str(entry["file"]))
        students = {}
        notes = {}
        for other in others:
            drawn = _open(other.folder / str(other.images[row]["file"]))
            if drawn is not None:
                students[other.name] = _data(drawn, LONGEST)
                verdict = _verdict(other.images[row])
                judged = "teacher passes" if entry.get("passed") else "teacher fails"
                notes[other.name] = f"{judged}; {other.name} {verdict}"
        if picture is not None and len(students) == len(others):
            pairs.append(
                Pair(
                    prompt=str(entry["prompt"]),
                    seed=int(entry["seed"]),
                    teacher=_data(picture, LONGEST),
                    students=students,
                    notes=notes,
                    size=_fit(picture.size, LONGEST),
                )
            )
    return Gallery(
        title="Composition prompts",
        prompts="composition prompts that --score drew and judged",
        of=len(teacher.images),
        choice="Beside the teacher",
        views={other.name: other.name for other in reversed(others)},
        pairs=tuple(pairs),
    )


def _by_category(images: Sequence[Any]) -> list[list[int]]:
    """Rows of each category, as many as together make `PAIRS_SHOWN`."""
    rows: dict[str, list[int]] = {}
    for row, entry in enumerate(images):
        rows.setdefault(str(entry["category"]), []).append(row)
    each = max(1, PAIRS_SHOWN // max(len(rows), 1))
    return [[part[i] for i in _spread(len(part), each)] for part in rows.values()]


def _verdict(entry: Any) -> str:
    reasons = ", ".join(map(str, entry.get("reasons", ())))
    return "passes" if entry.get("passed") else f"fails ({reasons})"


def _open(path: Path) -> Image.Image | None:
    """A picture, or None for a file that is not there or was cut off."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


def _fit(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size whose longer side is at most `longest`."""
    shrink = min(1.0, longest / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def _data(picture: Image.Image, longest: int) -> str:
    size = _fit(picture.size, longest)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, format="WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
