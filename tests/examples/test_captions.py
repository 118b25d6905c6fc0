"""Captions say what their claims say: read back by a reader that knows no template."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from examples.tiny_flux import captions
from examples.tiny_flux.captions import write_caption
from examples.tiny_flux.scenes import sample_claim
from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.vocabulary import OPPOSITE, RELATIONS

SHAPE_OF = {
    word: shape for shape, forms in captions.SHAPE_WORDS.items() for form in forms for word in form
}
COLOR_OF = {word: color for color, words in captions.COLOR_WORDS.items() for word in words}
SIZE_OF = {word: size for size, words in captions.SIZE_WORDS.items() for word in words}
NUMBER_OF = {"a": 1, "an": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}
NUMBER_OF |= {"four": 4, "4": 4, "pair": 2, "single": 1}


def written(count: int, wanted=lambda claim: True) -> list[tuple[Claim, str]]:
    rng = random.Random(1)
    pairs = []
    while len(pairs) < count:
        claim = sample_claim(rng)
        if wanted(claim):
            pairs.append((claim, write_caption(claim, rng).lower()))
    return pairs


def test_shapes_colors_sizes_and_numbers_are_the_claims():
    unrelated = written(3000, lambda claim: claim.relation is None and not claim.background)
    for claim, text in unrelated:
        words = re.findall(r"\w+", text)
        nouns = [word for word in words if word in SHAPE_OF]
        assert Counter(SHAPE_OF[w] for w in nouns) == Counter(g.shape for g in claim.groups)
        colors = Counter(COLOR_OF[word] for word in words if word in COLOR_OF)
        assert colors == Counter(group.color for group in claim.groups if group.color)
        sizes = Counter(SIZE_OF[word] for word in words if word in SIZE_OF)
        assert sizes == Counter(group.size for group in claim.groups if group.size)
        # The number is the last such word before each noun.
        said = Counter()
        for noun in nouns:
            at = words.index(noun)
            before = [NUMBER_OF[word] for word in words[:at] if word in NUMBER_OF]
            said[SHAPE_OF[noun], before[-1]] += 1
            words[at] = "-"
        assert said == Counter((group.shape, group.count) for group in claim.groups)


def test_colors_stand_with_their_shapes():
    """In "a red circle and a star that is cyan" each colour is in its own noun's phrase."""
    for claim, text in written(1500, lambda c: c.relation is None and len(c.groups) > 1):
        if claim.background:
            continue
        phrases = re.split(r",| and | with (?=\w+ )| next to | together with | beside ", text)
        found = set()
        for phrase in phrases:
            words = re.findall(r"\w+", phrase)
            shapes = [SHAPE_OF[word] for word in words if word in SHAPE_OF]
            colors = [COLOR_OF[word] for word in words if word in COLOR_OF]
            if shapes:
                assert len(shapes) == 1
                found.add((shapes[0], colors[0] if colors else None))
        assert found == {(group.shape, group.color) for group in claim.groups}


def read_relation(text: str) -> tuple[str, str, str]:
    """(first shape, relation, second shape) of a caption about two different shapes."""
    mentions = [(m.start(), SHAPE_OF[m[0]]) for m in re.finditer(r"\w+", text) if m[0] in SHAPE_OF]
    first, second = mentions[0][1], mentions[1][1]
    sides = {"on the left": "left of", "on the right": "right of"}
    sides |= {"at the top": "above", "at the bottom": "below"}
    spots = sorted(
        (m.start(), relation)
        for side, relation in sides.items()
        for m in re.finditer(side + r"(?! of| side)", text)
    )
    if len(spots) == 2:  # one side before or after each noun, in the nouns' order
        return first, spots[0][1], second
    phrases = {p: r for r, options in captions.RELATION_WORDS.items() for p in options}
    at, phrase = min(
        (m.start(), -len(p), p)
        for p in phrases
        for m in re.finditer(rf"\b{p}\b(?! a \w+ background)", text)
    )[::2]
    if text.startswith("over a ") and "background" in text.split("there")[0]:
        raise AssertionError("a background is no object")
    if re.search(rf"{phrase} it\b", text):
        return second, phrases[phrase], first
    if at < mentions[0][0]:
        return second, phrases[phrase], first
    if len(mentions) > 2:  # "..., the circle is above the star"
        first = mentions[2][1]
        second = next(shape for _, shape in mentions[:2] if shape != first)
    return first, phrases[phrase], second


def test_relations_are_the_claims_in_both_directions():
    def wanted(claim: Claim) -> bool:
        return claim.relation is not None and claim.groups[0].shape != claim.groups[1].shape

    directions = Counter()
    for claim, text in written(3000, wanted):
        assert claim.relation is not None
        a, b = (group.shape for group in claim.groups)
        truths = {(a, claim.relation, b), (b, OPPOSITE[claim.relation], a)}
        seen = read_relation(text)
        assert seen in truths, text
        directions[seen == (a, claim.relation, b)] += 1
    assert min(directions.values()) > 1000


def test_objects_of_one_shape_are_told_apart_by_color():
    groups = (Group(shape="star", color="red"), Group(shape="star", color="cyan"))
    claim = Claim(groups=groups, relation="above")
    rng = random.Random(0)
    texts = [write_caption(claim, rng) for _ in range(300)]
    assert any("the red one" in text or "the cyan one" in text for text in texts)
    assert not any("the star" in text.lower() for text in texts)


@pytest.mark.parametrize("background", [None, "navy"])
def test_backgrounds_are_said_if_claimed(background):
    claim = Claim(groups=(Group(shape="star"),), background=background)
    rng = random.Random(0)
    for _ in range(300):
        text = write_caption(claim, rng).lower()
        assert bool(re.search("navy|dark blue", text)) == (background is not None), text


def test_captions_are_varied_and_well_formed():
    pairs = written(4000)
    texts = {text for _, text in pairs}
    assert len(texts) > 3000
    for text in texts:
        assert "  " not in text
        assert " ," not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        assert len(text.split()) <= 30
    starts = Counter(" ".join(text.split()[:3]) for text in texts)
    assert starts["a photo of"] > 0.15 * len(texts)  # GenEval's wording
    assert {relation for claim, _ in pairs if (relation := claim.relation)} == set(RELATIONS)
