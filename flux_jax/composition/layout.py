"""Where objects stand: GenEval's spatial relations, and drawing scenes that satisfy claims.

The relation rule follows GenEval (Ghosh et al. 2023), `relative_position` in its
evaluation/evaluate_images.py: the offset of the box centres, each component shortened by a tenth
of the two boxes' sides, must keep more than half of the offset's length along the axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from flux_jax.composition.claim import Claim
from flux_jax.composition.scene import BACKGROUND_NAMES, COLOR_NAMES, SceneArrays
from flux_jax.composition.vocabulary import (
    CANVAS,
    COLORS,
    HELD_OUT_ARRANGEMENTS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    is_held_out_pair,
)

SHORTENING = 0.1  # of the sum of two boxes' sides, as in GenEval
DOMINANCE = 0.5  # of the offset's length, as in GenEval

BORDER = 3  # canvas units between an object's box and the edge
GAP = 5  # between two objects' boxes: wide enough for a detector to see two parts
MAX_SLOPE = 0.5  # stated relations are drawn with at most this minor / major offset

SMALL_RADII = (13, 14)
# By the number of objects in the scene: four of radius 22 would hardly find room.
LARGEST_RADIUS = (22, 22, 20, 19)
LARGE_FROM = (19, 19, 18, 18)

# Tries a scene; a round costs time only for scenes still without a place. From `FREE_ROUNDS` on,
# every other round puts each object in a quarter of its own: four large objects hardly ever find
# their places by chance.
ROUNDS, FREE_ROUNDS = 500, 40


def relations(
    offset: Float[np.ndarray, "*B 2"], sides: Float[np.ndarray, "*#B 2"]
) -> Bool[np.ndarray, "*B 4"]:
    """Which of `RELATIONS` hold of a pair of boxes (two may hold on a diagonal, or none).

    Args:
      offset: first box's centre minus the second's, (x, y), y down.
      sides: width and height of both boxes added up.
    """
    shortened = np.maximum(np.abs(offset) - SHORTENING * sides, 0.0) * np.sign(offset)
    length = np.linalg.norm(offset, axis=-1, keepdims=True)
    x, y = np.moveaxis(shortened / np.maximum(length, 1e-6), -1, 0)
    return np.stack([x < -DOMINANCE, x > DOMINANCE, y < -DOMINANCE, y > DOMINANCE], axis=-1)


def _held_out_table() -> Bool[np.ndarray, "4 8 8"]:
    """[relation, first shape, second shape], both reading directions."""
    table = np.zeros((4, len(SHAPES), len(SHAPES)), bool)
    for relation, first, second in HELD_OUT_ARRANGEMENTS:
        index, a, b = RELATIONS.index(relation), SHAPES.index(first), SHAPES.index(second)
        table[index, a, b] = table[index + 1, b, a] = True  # RELATIONS lists opposites in pairs
    return table


def shows_held_out(scenes: SceneArrays) -> Bool[np.ndarray, " B"]:
    """Whether any two objects of a scene stand in a held-out arrangement.

    Boxes count as points here, which makes more relations hold: the stricter reading.
    """
    table = _held_out_table()
    found = np.zeros(len(scenes.background), bool)
    centers = np.stack([scenes.x, scenes.y], axis=-1).astype(np.float32)
    for i in range(MAX_OBJECTS):
        for j in range(i + 1, MAX_OBJECTS):
            holds = relations(centers[:, i] - centers[:, j], np.zeros(2, np.float32))
            forbidden = table[:, scenes.shape[:, i], scenes.shape[:, j]].T
            both = (scenes.shape[:, i] >= 0) & (scenes.shape[:, j] >= 0)
            found |= both & (holds & forbidden).any(axis=-1)
    return found


def _fits(scenes: SceneArrays, relation: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
    """No two boxes nearer than `GAP`, and the stated relation plain to see."""
    x, y = scenes.x.astype(np.int32), scenes.y.astype(np.int32)
    radius = scenes.radius.astype(np.int32)
    there = scenes.shape >= 0
    good = np.ones(len(relation), bool)
    for i in range(MAX_OBJECTS):
        for j in range(i + 1, MAX_OBJECTS):
            apart = np.maximum(np.abs(x[:, i] - x[:, j]), np.abs(y[:, i] - y[:, j]))
            enough = apart >= radius[:, i] + radius[:, j] + GAP
            good &= enough | ~(there[:, i] & there[:, j])
    # Along the relation's axis the first object comes before the second, or after it.
    dx, dy = x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]
    sign = np.where(relation % 2 == 0, -1, 1)
    major, minor = np.where(relation < 2, dx, dy) * sign, np.where(relation < 2, dy, dx)
    return good & ((relation < 0) | ((major > 0) & (np.abs(minor) <= MAX_SLOPE * major)))


def _ranges(
    radius: Int[np.ndarray, "N 4"], rng: np.random.Generator, *, corners: bool
) -> tuple[Int[np.ndarray, "2 N 4"], Int[np.ndarray, "2 N 4"]]:
    """Lowest and highest x and y of each object: anywhere, or each in a quarter of its own."""
    low, high = radius + BORDER, CANVAS - radius - BORDER
    if not corners:
        return np.stack([low, low]), np.stack([high, high])
    quarter = rng.permuted(np.tile(np.arange(MAX_OBJECTS), (len(radius), 1)), axis=1)
    later = np.stack([quarter % 2, quarter // 2]).astype(bool)
    middle, room = CANVAS // 2, GAP // 2 + 1
    return np.where(later, middle + radius + room, low), np.where(
        later, high, middle - radius - room
    )


def place(
    scenes: SceneArrays,
    relation: Int[np.ndarray, " B"],
    rng: np.random.Generator,
    *,
    keep_held_out_unseen: bool,
) -> Bool[np.ndarray, " B"]:
    """Draw the positions of all objects, in place, until they fit.

    Args:
      scenes: shapes, colours and radii are read; `x` and `y` are overwritten.
      relation: index into `RELATIONS` between slots 0 and 1, or -1.
      rng: the only source of randomness.
      keep_held_out_unseen: refuse scenes with a held-out arrangement.

    Returns:
      Which scenes found a place. The others must not be used.
    """
    todo = np.arange(len(relation))
    for attempt in range(ROUNDS):
        if not len(todo):
            break
        corners = attempt >= FREE_ROUNDS and attempt % 2 == 1
        low, high = _ranges(scenes.radius[todo].astype(np.int32), rng, corners=corners)
        scenes.x[todo], scenes.y[todo] = rng.integers(low, high, endpoint=True)
        tried = scenes.take(todo)
        good = _fits(tried, relation[todo])
        if keep_held_out_unseen:
            good &= ~shows_held_out(tried)
        todo = todo[~good]
    placed = np.ones(len(relation), bool)
    placed[todo] = False
    return placed


def _radii(rng: np.random.Generator, size: str | None, total: int, count: int) -> np.ndarray:
    """Radii of one group; every second group without a stated size is of one size all the same."""
    low, high = SMALL_RADII[0], LARGEST_RADIUS[total - 1]
    if size == "small":
        high = SMALL_RADII[1]
    elif size == "large":
        low = LARGE_FROM[total - 1]
    return rng.integers(low, high, size=count if rng.random() < 0.5 else 1, endpoint=True)


def realise(
    claims: Sequence[Claim], rng: np.random.Generator, *, keep_held_out_unseen: bool = True
) -> tuple[SceneArrays, Bool[np.ndarray, " B"]]:
    """One scene for each claim that satisfies it; whatever a claim leaves unsaid is random.

    Args:
      claims: what the scenes must show: exactly these objects and no others.
      rng: the only source of randomness.
      keep_held_out_unseen: draw no held-out colour-shape pair where a colour is unsaid, and
        no held-out arrangement at all (claims of held-out things then find no place).

    Returns:
      The scenes, and which of them found a place.
    """
    allowed = {
        shape: [
            index
            for index, color in enumerate(COLORS)
            if not (keep_held_out_unseen and is_held_out_pair(color, shape))
        ]
        for shape in SHAPES
    }
    scenes = SceneArrays.empty(len(claims))
    relation = np.full(len(claims), -1, np.int32)
    for row, claim in enumerate(claims):
        total, slot = sum(group.count for group in claim.groups), 0
        for group in claim.groups:
            slots = slice(slot, slot + group.count)
            slot += group.count
            scenes.shape[row, slots] = SHAPES.index(group.shape)
            scenes.radius[row, slots] = _radii(rng, group.size, total, group.count)
            if group.color is not None:
                scenes.color[row, slots] = COLOR_NAMES.index(group.color)
            else:  # mostly one colour for the whole group, as in most pictures
                several = group.count if rng.random() < 0.4 else 1
                scenes.color[row, slots] = rng.choice(allowed[group.shape], size=several)
        scenes.background[row] = (
            rng.integers(len(BACKGROUND_NAMES))
            if claim.background is None
            else BACKGROUND_NAMES.index(claim.background)
        )
        if claim.relation is not None:
            relation[row] = RELATIONS.index(claim.relation)
    placed = place(scenes, relation, rng, keep_held_out_unseen=keep_held_out_unseen)
    return scenes, placed
