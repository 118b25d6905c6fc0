"""The score: right about drawings, low for shuffled prompts, and GenEval's rules one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.detector import DetectedObject, Detection
from flux_jax.composition.prompts import EvalPrompt
from flux_jax.composition.render import draw
from flux_jax.composition.scene import Scene, SceneObject
from flux_jax.composition.score import check_detector, format_table, judge, score_images


def test_detector_is_right_on_drawings_and_low_on_shuffled_prompts():
    truth, shuffled = check_detector()
    assert truth.overall.count == 720
    for name, share in truth.categories.items():
        assert share.passed >= 0.99, name
        assert share.exact >= 0.99, name
    # Chance alone: one in eight for a shape named alone, less for all else.
    assert shuffled.overall.passed <= 0.10
    assert max(share.passed for share in shuffled.categories.values()) <= 0.20


def item(shape: str | None, color: str | None, x: float = 64, y: float = 64, radius: float = 20):
    return DetectedObject(
        shape=shape, color=color, x=x, y=y, width=2 * radius, height=2 * radius, radius=radius,
        confidence=0.95,
    )  # fmt: skip


def verdict(claim: Claim, *objects: DetectedObject, counting: bool = False):
    return judge(Detection(objects=objects, background="white"), claim, counting=counting)


CIRCLE = Claim(groups=(Group(shape="circle"),))
RED_CIRCLE = Claim(groups=(Group(shape="circle", color="red"),))
BOTH = (Group(shape="circle", color="red"), Group(shape="star", color="cyan"))
LEFT = Claim(groups=BOTH, relation="left of")


@pytest.mark.parametrize(
    ("claim", "objects", "counting", "passed", "exact"),
    [
        (CIRCLE, [item("circle", "red")], False, True, True),
        (CIRCLE, [item("circle", "red"), item("star", "red")], False, True, False),
        (CIRCLE, [item("circle", "red")] * 2, False, True, False),
        (CIRCLE, [item("circle", "red")] * 2, True, False, False),
        (CIRCLE, [item("circle", "red"), item("star", "red")], True, True, False),
        (CIRCLE, [item("circle", "red"), item(None, "red")], False, True, False),
        (RED_CIRCLE, [item("circle", "red"), item("star", "blue")], False, True, False),
        (Claim(groups=BOTH), [item("star", "cyan"), item("circle", "red")], False, True, True),
        (LEFT, [item("circle", "red", x=30), item("star", "cyan", x=90)], False, True, True),
    ],
)
def test_what_passes(claim, objects, counting, passed, exact):
    result = verdict(claim, *objects, counting=counting)
    assert (result.passed, result.exact) == (passed, exact)
    assert bool(result.reasons) != passed


@pytest.mark.parametrize(
    ("claim", "objects", "reason"),
    [
        (CIRCLE, [], "circle: 0 seen, expected 1"),
        (CIRCLE, [item(None, "red")], "circle: 0 seen, expected 1"),
        (RED_CIRCLE, [item("circle", "blue")], "a circle is blue, expected red"),
        (RED_CIRCLE, [item("circle", None)], "a circle is None, expected red"),
        (RED_CIRCLE, [item("circle", c) for c in ("red", "blue")], "a circle is blue, expected"),
        (Claim(groups=BOTH), [item("circle", "cyan"), item("star", "red")], "expected red"),
        (
            LEFT,
            [item("circle", "red", x=90), item("star", "cyan", x=30)],
            "red circle is right of cyan star, expected left of",
        ),
        (
            LEFT,
            [item("circle", "red", x=64), item("star", "cyan", x=67)],
            "red circle is in no clear relation to cyan star, expected left of",
        ),
        (  # one pair stands right, the other does not
            LEFT,
            [item("circle", "red", x=x) for x in (20, 110)] + [item("star", "cyan", x=64)],
            "red circle is right of cyan star",
        ),
        (
            Claim(groups=(Group(shape="ring", size="small"),)),
            [item("ring", "red", radius=20)],
            "ring: not small",
        ),
        (
            Claim(groups=(Group(shape="ring"),), background="black"),
            [item("ring", "red")],
            "background is white, expected black",
        ),
    ],
)
def test_what_fails_and_why(claim, objects, reason):
    result = verdict(claim, *objects)
    assert not result.passed
    assert not result.exact
    assert any(reason in said for said in result.reasons)


def prompts_and_images():
    red = SceneObject(shape="circle", color="red", x=40, y=60, radius=20)
    image = draw(Scene(objects=(red,), background="white"))
    texts = [("colors", RED_CIRCLE, "string"), ("single_object", CIRCLE, "string")]
    wrong = Claim(groups=(Group(shape="heart", color="red"),))
    texts.append(("colors", wrong, "pair"))
    prompts = [
        EvalPrompt(prompt="-", category=category, spec=claim, held_out=kind)
        for category, claim, kind in texts
    ]
    return prompts, image


def test_overall_is_the_mean_of_the_categories():
    prompts, image = prompts_and_images()
    scores = score_images([image, Image.fromarray(image), image], prompts)
    assert scores.categories["colors"].passed == 0.5
    assert scores.categories["single_object"].passed == 1.0
    assert scores.overall.passed == scores.overall.exact == 0.75
    assert scores.overall.count == 3
    assert scores.held_out["pair"].passed == 0.0
    assert [verdict.passed for verdict in scores.verdicts] == [True, True, False]
    assert json.loads(json.dumps(scores.to_dict()))["categories"]["colors"]["count"] == 2
    table = format_table(scores).splitlines()
    assert table[2].split() == "| single object | 1.000 | 1.000 | 1 |".split()
    assert len({len(line) for line in table}) == 1


def test_numbers_of_images_and_prompts_must_agree():
    prompts, image = prompts_and_images()
    with pytest.raises(ValueError, match="one for each of the 3 prompts .*; got 1"):
        score_images(np.stack([image]), prompts)
    with pytest.raises(ValueError, match=r"the 0 prompts \(at least one\); got 0"):
        score_images([], [])
