"""An exact detector for drawn scenes: from pixels to objects, without anything learned.

Pixels go to the nearest colour of the palette; connected parts of one colour become objects; the
shape is the template that overlaps a part best. It expects a plain background, as all scenes have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from flux_jax.composition.render import SIGNED_DISTANCES
from flux_jax.composition.scene import BACKGROUND_NAMES, COLOR_NAMES
from flux_jax.composition.vocabulary import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    SHAPES,
    SIZE_BOUNDARY,
)

# RGB distances. Two palette colours are at least 95 apart (75 for two backgrounds), so a pixel
# within 47 of one belongs to it. An autoencoder at 30 dB moves a pixel by 14 on average.
COLOR_REJECTION = 60.0
BACKGROUND_REJECTION = 37.0
# Canvas units squared. The smallest drawn shape, a star of radius 13, covers 220; the largest
# rim or ringing patch that survives the erosion stays under 40.
SMALLEST_PART = 60
THICK = 6  # pixels of a part that a 3 x 3 erosion must leave
RIM = 3  # pixels around a part's sure core in which half-covered pixels may belong to it
CELLS = 32  # side of the grid on which a part meets the templates
TEMPLATE_AREA = 300.0  # cells that every template covers: sizes are taken out before comparing
LEAST_OVERLAP = 0.80  # intersection over union; drawn shapes reach 0.9 and more
LEAST_LEAD = 0.02  # over the second-best shape


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """One part of the picture that differs from the background.

    `shape` is None where no template fits well enough, `color` where no palette colour is near.
    `x`, `y` (box centre), `width`, `height` and `radius` (from the area) are canvas units.
    `confidence` is the overlap with the best template, in [0, 1].
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    width: float
    height: float
    radius: float
    confidence: float

    @property
    def size(self) -> str:
        """Small or large, as `SIZES`."""
        return "large" if self.radius >= SIZE_BOUNDARY else "small"


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The `objects` seen in one picture. `background` is None if it is no colour of the palette."""

    objects: tuple[DetectedObject, ...]
    background: str | None


@dataclass(frozen=True, kw_only=True)
class _Part:
    color: str | None
    mask: Bool[np.ndarray, "h w"]  # the box around it
    top: int
    left: int


@cache
def _templates() -> tuple[
    Float[np.ndarray, "K C2"], Float[np.ndarray, " K"], Int[np.ndarray, " K"], dict[str, float]
]:
    """Masks of all shapes on the cell grid, jittered, their areas, and whose they are.

    Also each shape's area in units of its radius squared.
    """
    fine = (np.arange(400) + 0.5) / 200 - 1
    u, v = np.meshgrid(fine, fine)
    grid = np.arange(CELLS) - (CELLS - 1) / 2
    masks, owners, areas = [], [], {}
    for index, name in enumerate(SHAPES):
        inside = SIGNED_DISTANCES[name](np, u, v) < 0
        areas[name] = float(inside.mean() * 4)
        centre_x, centre_y = float(u[inside].mean()), float(v[inside].mean())
        for scale in (0.94, 1.0, 1.06):
            radius = scale * np.sqrt(TEMPLATE_AREA / areas[name])
            for shift_x in (-0.6, 0.0, 0.6):
                for shift_y in (-0.6, 0.0, 0.6):
                    x = (grid[None, :] - shift_x) / radius + centre_x
                    y = (grid[:, None] - shift_y) / radius + centre_y
                    distance = SIGNED_DISTANCES[name](np, x, y) * radius
                    masks.append(np.clip(0.5 - distance, 0.0, 1.0).ravel())
                    owners.append(index)
    table = np.stack(masks).astype(np.float32)
    return table, table.sum(axis=1), np.array(owners), areas


def _resample(part: _Part) -> Float[np.ndarray, " C2"]:
    """The part on the cell grid: centroid in the middle, area `TEMPLATE_AREA` (bilinear)."""
    mask = np.pad(part.mask, 1).astype(np.float32)
    total = mask.sum()
    rows, columns = np.arange(mask.shape[0]), np.arange(mask.shape[1])
    row = (mask.sum(axis=1) * rows).sum() / total
    column = (mask.sum(axis=0) * columns).sum() / total
    step = np.sqrt(total / TEMPLATE_AREA)
    grid = (np.arange(CELLS) - (CELLS - 1) / 2) * step

    def weights(centre: float, length: int) -> Float[np.ndarray, "cells pixels"]:
        distance = np.abs(grid[:, None] + centre - np.arange(length))
        # A triangle as wide as a cell, at least a pixel: averages when it shrinks the part.
        wide = np.maximum(1.0 - distance / max(step, 1.0), 0.0)
        return wide / max(step, 1.0)

    down = weights(row, mask.shape[0])
    across = weights(column, mask.shape[1])
    return np.clip(down @ mask @ across.T, 0.0, 1.0).ravel().astype(np.float32)


def classify_shapes(
    parts: Sequence[_Part],
) -> tuple[list[str | None], list[float]]:
    """The best-fitting shape of each part, or None, and its overlap."""
    if not parts:
        return [], []
    table, areas, owners, _ = _templates()
    masks = np.stack([_resample(part) for part in parts])
    common = np.stack([np.minimum(table, mask).sum(axis=1) for mask in masks])
    overlap = common / (masks.sum(axis=1)[:, None] + areas[None, :] - common)
    best = np.stack([overlap[:, owners == k].max(axis=1) for k in range(len(SHAPES))], axis=1)
    order = np.argsort(best, axis=1)
    names: list[str | None] = []
    scores: list[float] = []
    for scores_of, ranked in zip(best, order, strict=True):
        first, second = scores_of[ranked[-1]], scores_of[ranked[-2]]
        sure = first >= LEAST_OVERLAP and first - second >= LEAST_LEAD
        names.append(SHAPES[ranked[-1]] if sure else None)
        scores.append(float(first))
    return names, scores


def _background(pixels: Float[np.ndarray, "H W 3"]) -> tuple[Float[np.ndarray, " 3"], str | None]:
    """The median colour of a frame of three pixels, and its name."""
    frame = np.concatenate(
        [pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3),
         pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)]
    )  # fmt: skip
    color = np.median(frame, axis=0)
    distances = np.linalg.norm(np.array(list(BACKGROUNDS.values())) - color, axis=1)
    nearest = int(distances.argmin())
    name = BACKGROUND_NAMES[nearest] if distances[nearest] <= BACKGROUND_REJECTION else None
    return color, name


def _cores(
    member: Bool[np.ndarray, "H W"], unit: float
) -> list[tuple[slice, slice, Bool[np.ndarray, "h w"]]]:
    """Connected parts that are large and thick enough to be objects: where, and their pixels.

    Each comes with a margin of `RIM` pixels around its box, where the picture has them.
    """
    from scipy import ndimage

    labelled: Any = ndimage.label(member, structure=np.ones((3, 3)))
    labels, number = labelled
    counted = []
    areas = np.bincount(labels.ravel(), minlength=number + 1) * unit * unit
    boxes: Any = ndimage.find_objects(labels)
    for label, (rows, columns) in enumerate(boxes, start=1):
        if areas[label] < SMALLEST_PART:
            continue
        window = (
            slice(max(rows.start - RIM, 0), rows.stop + RIM),
            slice(max(columns.start - RIM, 0), columns.stop + RIM),
        )
        core = labels[window] == label
        inner: Any = ndimage.binary_erosion(core, np.ones((3, 3)))
        if inner.sum() >= THICK:
            counted.append((*window, core))
    return counted


def _parts(pixels: Float[np.ndarray, "H W 3"], background: Float[np.ndarray, " 3"]) -> list[_Part]:
    """All objects of the picture."""
    from scipy import ndimage

    unit = CANVAS / pixels.shape[0]
    palette = np.array(list(COLORS.values()), np.float32)
    squares = (
        (pixels**2).sum(axis=-1)[..., None] - 2 * pixels @ palette.T + (palette**2).sum(axis=1)
    )
    away = np.sqrt(((pixels - background) ** 2).sum(axis=-1))
    nearest = squares.argmin(axis=-1)
    distance = np.sqrt(np.maximum(squares.min(axis=-1), 0.0))
    known = distance < np.minimum(away, COLOR_REJECTION)
    found: list[_Part] = []
    claimed = np.zeros(known.shape, bool)
    for index, name in enumerate(COLOR_NAMES):
        member = known & (nearest == index)
        if member.sum() * unit * unit < SMALLEST_PART:
            continue
        direction = palette[index] - background
        for rows, columns, core in _cores(member, unit):
            near = ndimage.binary_dilation(core, iterations=RIM)
            claimed[rows, columns] |= near
            share = (pixels[rows, columns] - background) @ direction / (direction @ direction)
            # Rim pixels count where the object covers most of them; the sure pixels of other
            # objects in reach do not.
            mask = core | (near & ~known[rows, columns] & (share > 0.5))
            found.append(_crop(name, mask, rows.start, columns.start))
    strange = (away > COLOR_REJECTION) & ~known & ~claimed
    for rows, columns, core in _cores(strange, unit):
        found.append(_crop(None, core, rows.start, columns.start))
    return found


def _crop(color: str | None, mask: Bool[np.ndarray, "H W"], top: int, left: int) -> _Part:
    """A part without the empty margin of its window, which begins at (top, left)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _Part(color=color, mask=box, top=top + int(rows[0]), left=left + int(columns[0]))


def detect(image: np.ndarray) -> Detection:
    """See the objects of one picture.

    Args:
      image: (side, side, 3) RGB bytes.

    Raises:
      ValueError: the image is not square RGB of type uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image: expected uint8 of shape (side, side, 3); got {image.dtype} of {image.shape}: "
            "pass np.asarray(picture.convert('RGB'))"
        )
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"image: expected a square; got {image.shape[0]} x {image.shape[1]}")
    pixels = image.astype(np.float32)
    color, background = _background(pixels)
    parts = _parts(pixels, color)
    names, scores = classify_shapes(parts)
    unit = CANVAS / image.shape[0]
    areas = _templates()[3]
    objects = []
    for part, name, score in zip(parts, names, scores, strict=True):
        height, width = part.mask.shape
        area = part.mask.sum() * unit * unit
        objects.append(
            DetectedObject(
                shape=name,
                color=part.color,
                x=(part.left + width / 2) * unit,
                y=(part.top + height / 2) * unit,
                width=width * unit,
                height=height * unit,
                radius=float(np.sqrt(area / (areas[name] if name else 2.0))),
                confidence=score,
            )
        )
    return Detection(objects=tuple(objects), background=background)
