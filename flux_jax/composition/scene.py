"""Scenes: what a picture holds, as frozen dataclasses and as padded arrays for rendering in bulk.

Coordinates are units of a 128 x 128 canvas, x to the right and y down, whatever the rendered size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, UInt8

from flux_jax.composition.vocabulary import BACKGROUNDS, CANVAS, COLORS, MAX_OBJECTS, SHAPES

COLOR_NAMES = tuple(COLORS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One drawn shape, in the box of sides 2 `radius` around (`x`, `y`), in canvas units.

    Invariants: `shape` and `color` are words of the vocabulary; the box lies on the canvas. Raises
    ValueError otherwise.
    """

    shape: str
    color: str
    x: int
    y: int
    radius: int

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape: expected one of {', '.join(SHAPES)}; got {self.shape!r}")
        if self.color not in COLORS:
            raise ValueError(f"color: expected one of {', '.join(COLORS)}; got {self.color!r}")
        low, high = self.radius, CANVAS - self.radius
        if not (0 < self.radius and low <= self.x <= high and low <= self.y <= high):
            raise ValueError(
                f"object at ({self.x}, {self.y}) with radius {self.radius} leaves the canvas of "
                f"{CANVAS} x {CANVAS}: move it inside or make it smaller"
            )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and one to four objects whose boxes do not overlap (not checked here)."""

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(
                f"background: expected one of {', '.join(BACKGROUNDS)}; got {self.background!r}"
            )
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(
                f"objects: expected 1 to {MAX_OBJECTS} in a scene; got {len(self.objects)}"
            )


class SceneArrays(NamedTuple):
    """A batch of scenes, padded to four objects: 21 bytes a scene, and a JAX pytree.

    `shape` and `color` index `SHAPES` and `COLORS`; a free slot has shape -1. `x`, `y` and
    `radius` are canvas units. `background` indexes `BACKGROUNDS`.
    """

    shape: Int8[np.ndarray, "B 4"]
    color: Int8[np.ndarray, "B 4"]
    x: UInt8[np.ndarray, "B 4"]
    y: UInt8[np.ndarray, "B 4"]
    radius: UInt8[np.ndarray, "B 4"]
    background: Int8[np.ndarray, " B"]

    def take(self, rows: np.ndarray | slice) -> SceneArrays:
        """The scenes of these rows (indices, a mask or a slice)."""
        return SceneArrays(*(field[rows] for field in self))

    @classmethod
    def empty(cls, batch: int) -> SceneArrays:
        """`batch` scenes without objects."""
        slots = (batch, MAX_OBJECTS)
        return cls(
            shape=np.full(slots, -1, np.int8),
            color=np.zeros(slots, np.int8),
            x=np.zeros(slots, np.uint8),
            y=np.zeros(slots, np.uint8),
            radius=np.ones(slots, np.uint8),
            background=np.zeros(batch, np.int8),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[SceneArrays]) -> SceneArrays:
        """Batches joined in order."""
        return cls(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def pack(scenes: Sequence[Scene]) -> SceneArrays:
    """Scenes as arrays."""
    arrays = SceneArrays.empty(len(scenes))
    for row, scene in enumerate(scenes):
        arrays.background[row] = BACKGROUND_NAMES.index(scene.background)
        for slot, item in enumerate(scene.objects):
            arrays.shape[row, slot] = SHAPES.index(item.shape)
            arrays.color[row, slot] = COLOR_NAMES.index(item.color)
            arrays.x[row, slot] = item.x
            arrays.y[row, slot] = item.y
            arrays.radius[row, slot] = item.radius
    return arrays


def unpack(arrays: SceneArrays) -> list[Scene]:
    """Arrays as scenes: the inverse of `pack`."""
    scenes = []
    for row in range(len(arrays.background)):
        objects = tuple(
            SceneObject(
                shape=SHAPES[arrays.shape[row, slot]],
                color=COLOR_NAMES[arrays.color[row, slot]],
                x=int(arrays.x[row, slot]),
                y=int(arrays.y[row, slot]),
                radius=int(arrays.radius[row, slot]),
            )
            for slot in range(MAX_OBJECTS)
            if arrays.shape[row, slot] >= 0
        )
        background = BACKGROUND_NAMES[arrays.background[row]]
        scenes.append(Scene(objects=objects, background=background))
    return scenes
