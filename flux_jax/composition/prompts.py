"""The evaluation prompts: GenEval's six categories over drawn shapes, none of them trained on.

`data/prompts.jsonl` is what counts; `python -m flux_jax.composition.prompts` writes it anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.vocabulary import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
)

CATEGORIES = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attribution",
)
PER_CATEGORY = 120
WITH_HELD_OUT = 24  # of a category's prompts name something never drawn in training, if it can

# Half of the prompts are worded as GenEval's.
OPENINGS = ("a photo of ", "a photo of ", "a photo of ", "", "a picture of ", "an image of ")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NUMBERS = ("", "a", "two", "three", "four")


@dataclass(frozen=True, kw_only=True)
class EvalPrompt:
    """One evaluation prompt of one of `CATEGORIES`; a picture of it must show what `spec` claims.

    `held_out` is "string" (only this wording is new), "pair" (it names a colour and shape that
    never meet in training) or "arrangement" (two shapes that never stand so in training).
    """

    prompt: str
    category: str
    spec: Claim
    held_out: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "spec": self.spec.to_dict()}


def normalise(text: str) -> str:
    """The form in which prompts are compared: lower case, single spaces, no final period."""
    return " ".join(text.lower().split()).rstrip(".")


def load_prompts() -> list[EvalPrompt]:
    """The evaluation prompts, category by category."""
    text = files("flux_jax.composition").joinpath("data/prompts.jsonl").read_text("utf-8")
    return [
        EvalPrompt(**{**values, "spec": Claim.from_dict(values["spec"])})
        for values in map(json.loads, text.splitlines())
    ]


def _phrase(group: Group) -> str:
    noun = group.shape if group.count == 1 else PLURALS[group.shape]
    words = " ".join(word for word in (group.size, group.color, noun) if word)
    if group.count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[group.count]} {words}"


def _prompt(claim: Claim, rng: random.Random) -> str:
    joint = f" {claim.relation} " if claim.relation else " and "
    ending = f" on a {claim.background} background" if claim.background else ""
    return rng.choice(OPENINGS) + joint.join(map(_phrase, claim.groups)) + ending


def _single_object(rng: random.Random) -> Claim:
    size = rng.choice(SIZES) if rng.random() < 0.4 else None
    background = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.5 else None
    return Claim(groups=(Group(shape=rng.choice(SHAPES), size=size),), background=background)


def _two_object(rng: random.Random) -> Claim:
    first, second = rng.sample(SHAPES, 2)
    return Claim(groups=(Group(shape=first), Group(shape=second)))


def _counting(rng: random.Random) -> Claim:
    shape, other = rng.sample(SHAPES, 2)
    count = rng.choice((2, 3, 4))
    color = rng.choice((None, rng.choice(tuple(COLORS))))
    group = Group(shape=shape, count=count, color=color)
    if color and count < 4 and rng.random() < 0.5:
        rest = Group(shape=other, color=rng.choice(tuple(COLORS)), count=rng.randint(1, 4 - count))
        return Claim(groups=(group, rest))
    return Claim(groups=(group,))


def _colors(rng: random.Random) -> Claim:
    background = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.4 else None
    group = Group(shape=rng.choice(SHAPES), color=rng.choice(tuple(COLORS)))
    return Claim(groups=(group,), background=background)


def _position(rng: random.Random) -> Claim:
    shapes = rng.sample(SHAPES, 2)
    colors = rng.sample(tuple(COLORS), 2) if rng.random() < 0.5 else (None, None)
    first, second = (Group(shape=s, color=c) for s, c in zip(shapes, colors, strict=True))
    return Claim(groups=(first, second), relation=rng.choice(RELATIONS))


def _color_attribution(rng: random.Random) -> Claim:
    shapes, colors = rng.sample(SHAPES, 2), rng.sample(tuple(COLORS), 2)
    first, second = (Group(shape=s, color=c) for s, c in zip(shapes, colors, strict=True))
    return Claim(groups=(first, second))


_SAMPLERS: dict[str, Callable[[random.Random], Claim]] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attribution": _color_attribution,
}
# What a category's prompts with something held out name; the other kind stays out of them, so
# that a failure has one cause.
_HELD_OUT_KIND = {
    "counting": "pair",
    "colors": "pair",
    "position": "arrangement",
    "color_attribution": "pair",
}


def held_out_kind(claim: Claim) -> str:
    """What is new about a claim: "pair", "arrangement", "both", or only the "string"."""
    if claim.held_out_pair and claim.held_out_arrangement:
        return "both"
    if claim.held_out_pair:
        return "pair"
    return "arrangement" if claim.held_out_arrangement else "string"


def _distinct(
    category: str, kind: str, count: int, rng: random.Random, taken: set[str]
) -> Iterator[EvalPrompt]:
    while count:
        claim = _SAMPLERS[category](rng)
        prompt = _prompt(claim, rng)
        if held_out_kind(claim) == kind and normalise(prompt) not in taken:
            taken.add(normalise(prompt))
            count -= 1
            yield EvalPrompt(prompt=prompt, category=category, spec=claim, held_out=kind)


def generate_prompts() -> list[EvalPrompt]:
    """The prompts of the committed file: 120 a category, no string twice."""
    taken: set[str] = set()
    prompts: list[EvalPrompt] = []
    for category in CATEGORIES:
        rng = random.Random(f"0/{category}")
        kind = _HELD_OUT_KIND.get(category)
        marked = WITH_HELD_OUT if kind else 0
        prompts += _distinct(category, "string", PER_CATEGORY - marked, rng, taken)
        if kind:
            prompts += _distinct(category, kind, marked, rng, taken)
    return prompts


def write_prompts(path: Path) -> None:
    """Write the prompts as JSON lines."""
    lines = [json.dumps(prompt.to_dict(), ensure_ascii=False) for prompt in generate_prompts()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_prompts(Path(__file__).parent / "data" / "prompts.jsonl")
