"""The palette is far apart, and what is held out leaves everything else to learn from."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from flux_jax.composition.vocabulary import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_ARRANGEMENTS,
    HELD_OUT_PAIRS,
    SHAPES,
    is_held_out_arrangement,
    is_held_out_pair,
)


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def test_colors_are_far_apart():
    pairs = [*itertools.combinations(COLORS.values(), 2)]
    pairs += itertools.product(COLORS.values(), BACKGROUNDS.values())
    assert min(itertools.starmap(distance, pairs)) >= 95


def test_backgrounds_are_told_apart():
    assert min(itertools.starmap(distance, itertools.combinations(BACKGROUNDS.values(), 2))) >= 74


def test_held_out_pairs_use_each_shape_and_color_once():
    assert len(HELD_OUT_PAIRS) >= 6
    for column, words in enumerate((COLORS, SHAPES)):
        used = [pair[column] for pair in HELD_OUT_PAIRS]
        assert len(set(used)) == len(used)
        assert set(used) <= set(words)


def test_a_tenth_of_the_arrangements_is_held_out_evenly():
    everything = 2 * len(SHAPES) * (len(SHAPES) - 1)
    assert 0.09 <= len(HELD_OUT_ARRANGEMENTS) / everything <= 0.12
    assert {relation for relation, _, _ in HELD_OUT_ARRANGEMENTS} == {"left of", "above"}
    uses = Counter(shape for _, *both in HELD_OUT_ARRANGEMENTS for shape in both)
    assert set(uses) == set(SHAPES)
    assert max(uses.values()) <= 4
    # The mirror image of a held-out arrangement is trained on.
    for relation, first, second in HELD_OUT_ARRANGEMENTS:
        assert (relation, second, first) not in HELD_OUT_ARRANGEMENTS


def test_held_out_is_read_in_both_directions():
    assert is_held_out_pair("red", "heart")
    assert not is_held_out_pair("red", "circle")
    assert is_held_out_arrangement("left of", "circle", "star")
    assert is_held_out_arrangement("right of", "star", "circle")
    assert not is_held_out_arrangement("right of", "circle", "star")
    assert is_held_out_arrangement("below", "triangle", "circle")
