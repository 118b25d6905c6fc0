"""The words of the drawn world, and what of it is held out of training.

The tables are ordered: an index into `SHAPES`, `COLORS`, `BACKGROUNDS` or `RELATIONS` is what scene
arrays store, so entries are appended, never reordered.
"""

from __future__ import annotations

from types import MappingProxyType

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")

# Any two colours, and any colour and background, are at least 95 apart in RGB: five times what an
# autoencoder at 30 dB moves a pixel (test_vocabulary.py).
COLORS = MappingProxyType(
    {
        "red": (220, 30, 35),
        "orange": (250, 130, 10),
        "yellow": (255, 230, 20),
        "green": (30, 165, 60),
        "cyan": (0, 205, 220),
        "blue": (35, 80, 230),
        "purple": (135, 40, 175),
        "pink": (255, 95, 180),
    }
)

BACKGROUNDS = MappingProxyType(
    {
        "white": (255, 255, 255),
        "gray": (170, 170, 170),
        "black": (10, 10, 10),
        "navy": (20, 25, 90),
        "beige": (238, 222, 190),
    }
)

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = MappingProxyType(
    {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
)

# Radii are half the side of an object's box on the 128-unit canvas. A radius from `SIZE_BOUNDARY`
# on is seen as large; drawn sizes keep two units away from it whenever a size is stated.
CANVAS = 128
MAX_OBJECTS = 4
SIZES = ("small", "large")
SIZE_BOUNDARY = 16.0

# Never drawn in training. Each shape and each colour occurs at most once, so that every one of
# them is seen with seven others.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "heart"),
        ("orange", "ring"),
        ("yellow", "diamond"),
        ("green", "star"),
        ("blue", "triangle"),
        ("purple", "cross"),
        ("pink", "square"),
    }
)

# (relation, first, second), in the two canonical directions ("right of" and "below" are the same
# arrangements read backwards): 12 of 112. In training no two objects of a picture, named or not,
# stand like this. Each shape occurs three times, in both roles, on both axes.
HELD_OUT_ARRANGEMENTS = frozenset(
    {
        ("left of", "circle", "star"),
        ("left of", "square", "heart"),
        ("left of", "triangle", "ring"),
        ("left of", "diamond", "circle"),
        ("left of", "cross", "square"),
        ("left of", "heart", "diamond"),
        ("above", "circle", "triangle"),
        ("above", "star", "cross"),
        ("above", "ring", "square"),
        ("above", "heart", "star"),
        ("above", "triangle", "diamond"),
        ("above", "cross", "ring"),
    }
)


def is_held_out_pair(color: str, shape: str) -> bool:
    """Whether this colour never meets this shape in training."""
    return (color, shape) in HELD_OUT_PAIRS


def is_held_out_arrangement(relation: str, first: str, second: str) -> bool:
    """Whether `first relation second` never occurs in training, in either reading direction."""
    if relation in ("right of", "below"):
        relation, first, second = OPPOSITE[relation], second, first
    return (relation, first, second) in HELD_OUT_ARRANGEMENTS
