"""Captions in varied English for claims about drawn scenes.

A caption says exactly what its claim says: no template adds or drops a fact, so what a caption
leaves unsaid is free in the picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.vocabulary import OPPOSITE

T = TypeVar("T")

# The first word of each list is the plain one; it is taken three times in four.
SHAPE_WORDS = {
    "circle": (("circle", "circles"), ("disk", "disks"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "star": (("star", "stars"),),
    "cross": (("cross", "crosses"),),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "heart": (("heart", "hearts"),),
}
COLOR_WORDS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS = {
    "white": ("white",),
    "gray": ("gray", "grey"),
    "black": ("black",),
    "navy": ("navy", "dark blue"),
    "beige": ("beige", "cream"),
}
NUMBER_WORDS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "underneath", "lower than"),
}

OPENINGS = (
    "a photo of", "a picture of", "an image of", "a drawing of", "a photo showing",
    "a picture with", "an image with", "a scene with", "a drawing that shows", "this is",
    "we see", "here we see", "the picture shows", "the image shows", "draw", "please draw",
)  # fmt: skip
# What the sentence templates below say besides the tables; a test holds captions against it.
TEMPLATE_WORDS = (
    "a an and are at background beside both bottom colored exactly in is it left next of on one "
    "1 pair right side single that the there these to together top with"
)
BACKGROUND_ENDINGS = (
    "on a {} background", "on a {} background", "on {}", "against a {} background",
    "in front of a {} background", "over a {} background", ", {} background",
    ", the background is {}",
)  # fmt: skip
BACKGROUND_STARTS = ("on a {} background ,", "a {} background with", "{} background ,")


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    """The plain form three times in four, else any."""
    return options[0] if len(options) == 1 or rng.random() < 0.75 else rng.choice(options)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(group: Group, rng: random.Random, *, definite: bool = False) -> str:
    """Words for a group: "a small red circle", "three stars", "the ring that is pink"."""
    noun = _pick(rng, SHAPE_WORDS[group.shape])[group.count > 1]
    color = group.color and _pick(rng, COLOR_WORDS[group.color])
    size = group.size and _pick(rng, SIZE_WORDS[group.size])
    after = ""
    if color and rng.random() < 0.1:
        verb = "is" if group.count == 1 else "are"
        after = rng.choice((f" that {verb} {color}", f" in {color}", f" colored {color}"))
        color = None
    words = " ".join(word for word in (size, color, noun) if word)
    if definite:
        return f"the {words}{after}"
    if group.count == 1:
        chance = rng.random()
        if chance < 0.9:
            return _article(words) + after
        return rng.choice(("one ", "1 ", "a single ")) + words + after
    number = _pick(rng, NUMBER_WORDS[group.count])
    if group.count == 2 and rng.random() < 0.06:
        number = "a pair of"
    elif rng.random() < 0.04:
        number = "exactly " + number
    return f"{number} {words}{after}"


def _short(group: Group, other: Group, rng: random.Random) -> str:
    """A second mention that is told from the other object: by shape, else by colour."""
    if group.shape != other.shape:
        plain = Group(shape=group.shape)
        return noun_phrase(plain, rng, definite=True)
    assert group.color is not None  # groups of one shape name their colours (`Claim`)
    return f"the {_pick(rng, COLOR_WORDS[group.color])} one"


def _relation_phrase(claim: Claim, rng: random.Random) -> str:
    first, second = claim.groups
    relation = claim.relation
    assert relation is not None
    if rng.random() < 0.5:  # the same arrangement, read the other way
        first, second, relation = second, first, OPPOSITE[relation]
    a, b = noun_phrase(first, rng), noun_phrase(second, rng)
    words = _pick(rng, RELATION_WORDS[relation])
    chance = rng.random()
    if chance < 0.55:
        return f"{a} {words} {b}"
    if chance < 0.70:
        return f"{a} is {words} {b}"
    if chance < 0.76:
        return f"{a} that is {words} {b}"
    if chance < 0.82:
        the = _short(first, second, rng)
        return f"{a} and {b} , {the} is {words} {_short(second, first, rng)}"
    if chance < 0.88:
        return f"{words} {b} there is {a}"
    if chance < 0.94:
        return f"{b} with {a} {words} it"
    sides = {
        "left of": ("on the left", "on the right"),
        "right of": ("on the right", "on the left"),
        "above": ("at the top", "at the bottom"),
        "below": ("at the bottom", "at the top"),
    }[relation]
    if rng.random() < 0.5:
        return f"{a} {sides[0]} and {b} {sides[1]}"
    return f"{sides[0]} {a} , {sides[1]} {b}"


def _list_phrase(groups: Sequence[Group], rng: random.Random) -> str:
    phrases = [noun_phrase(group, rng) for group in groups]
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) == 2:
        joint = _pick(rng, ("and", "and", "with", "next to", "together with", "beside", ","))
        prefix = "both " if joint == "and" and rng.random() < 0.04 else ""
        return f"{prefix}{phrases[0]} {joint} {phrases[1]}"
    last = " and " if rng.random() < 0.85 else " , "
    return " , ".join(phrases[:-1]) + last + phrases[-1]


def write_caption(claim: Claim, rng: random.Random) -> str:
    """One caption of the claim, drawn from the grammar; the same `rng` state, the same caption."""
    groups = list(claim.groups)
    if claim.relation is not None:
        body = _relation_phrase(claim, rng)
        is_clause = " is " in f" {body} "
    else:
        rng.shuffle(groups)
        body, is_clause = _list_phrase(groups, rng), False

    opening = ""
    if not is_clause:
        chance = rng.random()
        if chance < 0.25:
            opening = "a photo of"
        elif chance < 0.55:
            opening = rng.choice(OPENINGS)
            if opening == "this is" and groups[0].count > 1:
                opening = "these are"
        elif chance < 0.60 and not body.startswith(("on ", "at ")):
            several = len(groups) == 1 and groups[0].count > 1
            opening = "there are" if several else "there is"
    if body.startswith(("on the left ", "on the right ", "at the ")):
        opening = ""

    if claim.background is not None:
        word = _pick(rng, BACKGROUND_WORDS[claim.background])
        if not opening and not body.startswith(("on ", "at ")) and rng.random() < 0.2:
            start = rng.choice(BACKGROUND_STARTS[:1] if is_clause else BACKGROUND_STARTS)
            body = f"{start.format(word)} {body}"
        else:
            ending = rng.choice(BACKGROUND_ENDINGS)
            if is_clause and not ending.startswith((",", "on a")):
                ending = BACKGROUND_ENDINGS[0]
            body = f"{body} {ending.format(word)}"
    text = f"{opening} {body}".strip().replace(" ,", ",")
    if rng.random() < 0.12:
        text += "."
    if rng.random() < 0.12:
        text = text[0].upper() + text[1:]
    return text
