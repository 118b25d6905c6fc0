"""The relation rule, and scenes that satisfy their claims with room between the objects."""

from __future__ import annotations

import numpy as np
import pytest

from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.layout import BORDER, GAP, realise, relations, shows_held_out
from flux_jax.composition.scene import Scene, SceneObject, pack, unpack
from flux_jax.composition.vocabulary import CANVAS, RELATIONS, is_held_out_pair


@pytest.mark.parametrize(
    ("offset", "side", "expected"),
    [
        ((-50, 0), 40, {"left of"}),
        ((50, 10), 40, {"right of"}),
        ((0, -50), 40, {"above"}),
        ((10, 50), 40, {"below"}),
        ((-50, -50), 40, {"left of", "above"}),
        ((-50, 35), 80, {"left of"}),  # 35 shortens to 27, under half of the length 61
        ((-3, 0), 40, set()),  # nearer than a tenth of the sides: no relation
        ((-50, 0), 400, set()),
        ((0, 0), 0, set()),
    ],
)
def test_relation_rule(offset, side, expected):
    holds = relations(np.array(offset, float), np.array([side, side], float))
    assert {name for name, hold in zip(RELATIONS, holds, strict=True) if hold} == expected


def claims() -> list[Claim]:
    ring, disk = Group(shape="ring", size="large"), Group(shape="circle", color="cyan")
    return [
        *(Claim(groups=(disk, ring), relation=relation) for relation in RELATIONS),
        Claim(groups=(Group(shape="star", count=4, size="large"),), background="black"),
        Claim(groups=(Group(shape="heart", count=3),)),
        Claim(groups=(Group(shape="cross", count=2, color="red", size="small"), disk, ring)),
    ] * 25


def test_realised_scenes_satisfy_their_claims():
    wanted = claims()
    arrays, placed = realise(wanted, np.random.default_rng(0))
    assert placed.all()
    assert not shows_held_out(arrays).any()
    for claim, scene in zip(wanted, unpack(arrays), strict=True):
        items = list(scene.objects)
        assert claim.background in (None, scene.background)
        if claim.relation:
            first, second = items
            holds = relations(
                np.array([first.x - second.x, first.y - second.y], float),
                np.full(2, 2.0 * (first.radius + second.radius)),
            )
            assert np.array(RELATIONS)[holds].tolist() == [claim.relation]
        for group in claim.groups:
            for item in items[: group.count]:
                assert item.shape == group.shape
                assert group.color in (None, item.color)
                assert group.size in (None, "large" if item.radius >= 18 else "small")
                assert not is_held_out_pair(item.color, item.shape)
            del items[: group.count]
        assert not items


def test_objects_keep_their_distance():
    arrays, placed = realise(claims(), np.random.default_rng(1))
    for scene in unpack(arrays.take(placed)):
        for i, a in enumerate(scene.objects):
            assert a.radius + BORDER <= min(a.x, a.y)
            assert max(a.x, a.y) <= CANVAS - a.radius - BORDER
            for b in scene.objects[:i]:
                apart = max(abs(a.x - b.x), abs(a.y - b.y))
                assert apart >= a.radius + b.radius + GAP


def test_the_same_seed_draws_the_same():
    first, second = (realise(claims(), np.random.default_rng(3))[0] for _ in range(2))
    other, _ = realise(claims(), np.random.default_rng(4))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.x != other.x).any()


def test_held_out_arrangements_find_no_place_in_training():
    claim = Claim(groups=(Group(shape="circle"), Group(shape="star")), relation="left of")
    _, placed = realise([claim], np.random.default_rng(0))
    assert not placed.any()
    arrays, placed = realise([claim], np.random.default_rng(0), keep_held_out_unseen=False)
    assert placed.all()
    assert shows_held_out(arrays).all()


def test_held_out_arrangements_are_seen_between_any_two():
    def scene(*places: tuple[str, int, int]) -> Scene:
        return Scene(
            objects=tuple(
                SceneObject(shape=shape, color="cyan", x=x, y=y, radius=13)
                for shape, x, y in places
            ),
            background="white",
        )

    star_right = scene(("heart", 20, 100), ("star", 100, 30), ("circle", 20, 30))
    star_left = scene(("heart", 20, 100), ("star", 20, 30), ("circle", 100, 30))
    assert shows_held_out(pack([star_right, star_left])).tolist() == [True, False]
