"""Claims refuse what no caption can say, and survive becoming JSON."""

from __future__ import annotations

import json

import pytest

from flux_jax.composition.claim import Claim, Group

CIRCLE, STAR = Group(shape="circle", color="red"), Group(shape="star", size="small")


def test_round_trip_through_json():
    for claim in (
        Claim(groups=(CIRCLE, STAR), relation="left of", background="navy"),
        Claim(groups=(Group(shape="ring", count=3),)),
    ):
        assert Claim.from_dict(json.loads(json.dumps(claim.to_dict()))) == claim


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group(shape="blob"), "shape: expected one of circle"),
        (lambda: Group(shape="star", color="mauve"), "color: expected one of red"),
        (lambda: Group(shape="star", size="vast"), "size: expected one of small, large"),
        (lambda: Group(shape="star", count=5), "count: expected 1 to 4; got 5"),
        (lambda: Claim(groups=()), "groups: expected 1 to 4 objects in all; got 0"),
        (lambda: Claim(groups=(CIRCLE, STAR), relation="near"), "relation: expected one of left"),
        (lambda: Claim(groups=(CIRCLE,), background="red"), "background: expected one of white"),
        (lambda: Claim(groups=(CIRCLE,), relation="above"), r"two groups of one object.*\[1\]"),
        (lambda: Claim(groups=(CIRCLE, CIRCLE)), "several of shape 'circle' need a colour each"),
        (lambda: Claim(groups=(STAR, Group(shape="star", color="red"))), "shape 'star'"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_held_out_marks():
    heart = Group(shape="heart", color="red")
    assert Claim(groups=(heart,)).held_out_pair
    assert not Claim(groups=(CIRCLE,)).held_out_pair
    assert Claim(groups=(CIRCLE, STAR), relation="left of").held_out_arrangement
    assert Claim(groups=(STAR, CIRCLE), relation="right of").held_out_arrangement
    assert not Claim(groups=(CIRCLE, STAR), relation="right of").held_out_arrangement
    assert not Claim(groups=(CIRCLE, STAR)).held_out_arrangement
