"""Drawing scenes from signed distances: one set of formulas for NumPy and, under jit, for JAX.

A shape is a function of (x, y) in units of its radius, y down, negative inside, that stays within
the box [-1, 1] x [-1, 1]. Near its outline it is a distance, so clipping it to one pixel's width
gives the share of the pixel that the shape covers.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from flux_jax.composition.scene import Scene, SceneArrays, pack
from flux_jax.composition.vocabulary import BACKGROUNDS, CANVAS, COLORS, MAX_OBJECTS, SHAPES

# `xp` is numpy or jax.numpy; arrays of either kind are `Any` to the type checker.


def _circle(xp: Any, x: Any, y: Any) -> Any:
    return xp.sqrt(x * x + y * y) - 0.96


def _square(xp: Any, x: Any, y: Any) -> Any:
    return xp.maximum(xp.abs(x), xp.abs(y)) - 0.86


def _triangle(xp: Any, x: Any, y: Any) -> Any:
    # Apex (0, -0.95), base from (-1, 0.8) to (1, 0.8).
    slope = math.hypot(1.75, 1.0)
    return xp.maximum((1.75 * xp.abs(x) - (y + 0.95)) / slope, y - 0.8)


def _diamond(xp: Any, x: Any, y: Any) -> Any:
    width, height = 0.7, 1.0
    return (xp.abs(x) * height + xp.abs(y) * width - width * height) / math.hypot(width, height)


def _star(xp: Any, x: Any, y: Any) -> Any:
    # Fold the plane onto one of ten equal wedges: there the outline is a single line from a tip
    # to the notch beside it.
    tip, notch, wedge = 1.0, 0.47, math.pi / 5
    angle = xp.abs(xp.mod(xp.arctan2(x, -(y - 0.06)) + wedge, 2 * wedge) - wedge)
    length = xp.sqrt(x * x + (y - 0.06) ** 2)
    along, across = length * xp.cos(angle), length * xp.sin(angle)
    run, rise = notch * math.cos(wedge) - tip, notch * math.sin(wedge)
    return ((along - tip) * rise - across * run) / math.hypot(run, rise)


def _cross(xp: Any, x: Any, y: Any) -> Any:
    x, y = xp.abs(x), xp.abs(y)
    return xp.minimum(xp.maximum(x - 0.96, y - 0.3), xp.maximum(x - 0.3, y - 0.96))


def _ring(xp: Any, x: Any, y: Any) -> Any:
    return xp.abs(xp.sqrt(x * x + y * y) - 0.71) - 0.25


def _heart(xp: Any, x: Any, y: Any) -> Any:
    # A square standing on its corner, and half a disk on each of its two upper sides.
    half = 0.81
    x, y = xp.abs(x), y - 0.1035 * half
    body = (x + xp.abs(y) - half) / math.sqrt(2.0)
    lobe = xp.sqrt((x - half / 2) ** 2 + (y + half / 2) ** 2) - half / math.sqrt(2.0)
    return xp.minimum(body, lobe)


SIGNED_DISTANCES = MappingProxyType(
    {
        "circle": _circle,
        "square": _square,
        "triangle": _triangle,
        "diamond": _diamond,
        "star": _star,
        "cross": _cross,
        "ring": _ring,
        "heart": _heart,
    }
)


def coverage(xp: Any, shape: Any, x: Any, y: Any, radius: Any, size: int) -> Float[Any, "B S S"]:
    """The share of each pixel that one object per picture covers, in [0, 1].

    Args:
      xp: numpy or jax.numpy.
      shape: (B,) indices into `SHAPES`; -1 covers nothing.
      x, y, radius: (B,) centres and radii in canvas units.
      size: side of the picture in pixels.
    """
    unit = CANVAS / size
    grid = (xp.arange(size, dtype=xp.float32) + 0.5) * unit
    radius = xp.asarray(radius, dtype=xp.float32)[:, None, None]
    u = (grid[None, None, :] - xp.asarray(x, dtype=xp.float32)[:, None, None]) / radius
    v = (grid[None, :, None] - xp.asarray(y, dtype=xp.float32)[:, None, None]) / radius
    distance = xp.ones((shape.shape[0], size, size), dtype=xp.float32)
    for index, name in enumerate(SHAPES):
        here = shape == index
        if xp is np:  # only the pictures with this shape: eight times less work
            if here.any():
                distance[here] = SIGNED_DISTANCES[name](np, u[here], v[here])
        else:
            distance = xp.where(here[:, None, None], SIGNED_DISTANCES[name](xp, u, v), distance)
    covered = xp.clip(0.5 - distance * radius / unit, 0.0, 1.0)
    return xp.where((shape >= 0)[:, None, None], covered, 0.0)


def render(scenes: SceneArrays, size: int = CANVAS) -> Float[Any, "B size size 3"]:
    """Pictures of a batch of scenes, in [-1, 1], float32.

    NumPy arrays are drawn by NumPy; JAX arrays by JAX, also under jit (`size` static). The two
    agree to float32 rounding.
    """
    xp = scenes.shape.__array_namespace__()
    colors = xp.asarray(np.array(list(COLORS.values()), np.float32) / 127.5 - 1.0)
    backgrounds = xp.asarray(np.array(list(BACKGROUNDS.values()), np.float32) / 127.5 - 1.0)
    batch = scenes.shape.shape[0]
    # Index arrays are widened: NumPy and JAX both take int32, and -1 is masked in `coverage`.
    picture = xp.broadcast_to(
        backgrounds[scenes.background.astype(xp.int32)][:, None, None, :], (batch, size, size, 3)
    )
    for slot in range(MAX_OBJECTS):
        alpha = coverage(
            xp, scenes.shape[:, slot], scenes.x[:, slot], scenes.y[:, slot],
            scenes.radius[:, slot], size,
        )[..., None]  # fmt: skip
        paint = colors[scenes.color[:, slot].astype(xp.int32)][:, None, None, :]
        picture = picture + alpha * (paint - picture)
    return picture


def to_uint8(pictures: Float[Any, "*B H W 3"]) -> UInt8[np.ndarray, "*B H W 3"]:
    """Pictures in [-1, 1] as bytes."""
    return np.clip(np.rint((np.asarray(pictures) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def draw(scene: Scene, size: int = CANVAS) -> UInt8[np.ndarray, "size size 3"]:
    """One scene as bytes."""
    return to_uint8(render(pack([scene]), size)[0])
