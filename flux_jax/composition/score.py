"""The composition score: GenEval's six categories, judged by the exact detector.

Rules (GenEval: Ghosh et al. 2023), each at least as strict as GenEval's own:

- Every object that the prompt names is there. Counting asks for exactly the named number, the
  other categories for at least one.
- *All* objects of a named shape have a named colour; GenEval looks at the most confident one.
- *All* pairs of the two named kinds stand in the named relation (rule in `layout.relations`).
- A stated size or background must be right; GenEval knows neither.

Beside the score stands the stricter share of *exact* pictures: those that pass and hold nothing
but what the prompt names, so that a picture full of everything cannot win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_jax.composition.claim import Claim, Group
from flux_jax.composition.detector import DetectedObject, Detection, detect
from flux_jax.composition.layout import realise, relations
from flux_jax.composition.prompts import CATEGORIES, EvalPrompt, load_prompts
from flux_jax.composition.render import render, to_uint8
from flux_jax.composition.vocabulary import RELATIONS

HELD_OUT_KINDS = ("string", "pair", "arrangement")
_UNSEEN = {"string": "wording alone", "pair": "colour and shape", "arrangement": "arrangement"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One picture's judgement, from its `detection`.

    `reasons` says what is wrong, and is empty if it `passed`; it is `exact` if it passed and holds
    nothing else.
    """

    passed: bool
    exact: bool
    reasons: tuple[str, ...]
    detection: Detection


@dataclass(frozen=True, kw_only=True)
class Share:
    """Shares of `count` pictures that passed, and that were exact."""

    passed: float
    exact: float
    count: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Share:
        """The shares among verdicts; 0 of 0 is 0."""
        count = len(verdicts)
        return cls(
            passed=sum(verdict.passed for verdict in verdicts) / max(count, 1),
            exact=sum(verdict.exact for verdict in verdicts) / max(count, 1),
            count=count,
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The score of a set of pictures.

    `overall` is the mean of the categories' shares, as in GenEval (and its `count` the number of
    pictures). `held_out` splits the pictures by what is new about their prompt. `verdicts` are in
    the order of the pictures.
    """

    overall: Share
    categories: Mapping[str, Share]
    held_out: Mapping[str, Share]
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values, without the verdicts."""
        return {
            "overall": vars(self.overall),
            "categories": {name: vars(share) for name, share in self.categories.items()},
            "held_out": {name: vars(share) for name, share in self.held_out.items()},
        }


def _matches(item: DetectedObject, group: Group) -> bool:
    return item.shape == group.shape and group.color in (None, item.color)


def _name(group: Group) -> str:
    return " ".join(word for word in (group.color, group.shape) if word)


def _relation_reasons(claim: Claim, first: Any, second: Any) -> list[str]:
    assert claim.relation is not None
    wanted = RELATIONS.index(claim.relation)
    for a in first:
        for b in second:
            offset = np.array([a.x - b.x, a.y - b.y], float)
            sides = np.array([a.width + b.width, a.height + b.height], float)
            holds = relations(offset, sides)
            if not holds[wanted]:
                seen = " and ".join(np.array(RELATIONS)[holds]) or "in no clear relation to"
                names = _name(claim.groups[0]), _name(claim.groups[1])
                return [f"{names[0]} is {seen} {names[1]}, expected {claim.relation}"]
    return []


def judge(detection: Detection, claim: Claim, *, counting: bool) -> Verdict:
    """Whether a picture shows what the claim says.

    Args:
      detection: what is seen.
      claim: what must be seen.
      counting: numbers must agree exactly; else there may be more.
    """
    reasons: list[str] = []
    members = [
        [item for item in detection.objects if _matches(item, group)] for group in claim.groups
    ]
    for group, found in zip(claim.groups, members, strict=True):
        number = len(found)
        if number < group.count or (counting and number > group.count):
            reasons.append(f"{_name(group)}: {number} seen, expected {group.count}")
        if group.size and any(item.size != group.size for item in found):
            reasons.append(f"{_name(group)}: not {group.size}")
    for item in detection.objects:
        same_shape = [group for group in claim.groups if group.shape == item.shape]
        if same_shape and not any(_matches(item, group) for group in same_shape):
            expected = " or ".join(str(group.color) for group in same_shape)
            reasons.append(f"a {item.shape} is {item.color}, expected {expected}")
    if claim.relation is not None:
        reasons += _relation_reasons(claim, *members)
    if claim.background not in (None, detection.background):
        reasons.append(f"background is {detection.background}, expected {claim.background}")
    total = sum(group.count for group in claim.groups)
    return Verdict(
        passed=not reasons,
        exact=not reasons and len(detection.objects) == total,
        reasons=tuple(reasons),
        detection=detection,
    )


def _pixels(image: Any) -> np.ndarray:
    """Bytes of an array or of a PIL image."""
    return np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)


def score_images(images: Sequence[Any] | np.ndarray, prompts: Sequence[EvalPrompt]) -> Scores:
    """Judge one picture for each prompt.

    Args:
      images: square pictures as PIL images or uint8 arrays (side, side, 3); an array
        (N, side, side, 3) will do.
      prompts: what each was drawn from; repeat a prompt to score several pictures of it.

    Raises:
      ValueError: the numbers differ or are zero, or a picture is not square RGB bytes.
    """
    if len(images) != len(prompts) or not len(prompts):
        raise ValueError(
            f"images: expected one for each of the {len(prompts)} prompts (at least one); "
            f"got {len(images)}"
        )
    return score_detections([detect(_pixels(image)) for image in images], prompts)


def score_detections(detections: Sequence[Detection], prompts: Sequence[EvalPrompt]) -> Scores:
    """Judge what was already seen; as many detections as prompts."""
    verdicts = tuple(
        judge(detection, prompt.spec, counting=prompt.category == "counting")
        for detection, prompt in zip(detections, prompts, strict=True)
    )

    def shares(field: str, values: Sequence[str]) -> dict[str, Share]:
        split = {
            value: [
                verdict
                for verdict, prompt in zip(verdicts, prompts, strict=True)
                if getattr(prompt, field) == value
            ]
            for value in values
        }
        return {value: Share.of(part) for value, part in split.items() if part}

    categories = shares("category", CATEGORIES)
    overall = Share(
        passed=float(np.mean([share.passed for share in categories.values()])),
        exact=float(np.mean([share.exact for share in categories.values()])),
        count=len(verdicts),
    )
    held_out = shares("held_out", HELD_OUT_KINDS)
    return Scores(overall=overall, categories=categories, held_out=held_out, verdicts=verdicts)


def format_table(scores: Scores) -> str:
    """The score as a Markdown table."""
    rows = [("category", "score", "exact", "images")]
    parts = [
        *scores.categories.items(),
        ("overall (mean of categories)", scores.overall),
        *((f"unseen in training: {_UNSEEN[kind]}", v) for kind, v in scores.held_out.items()),
    ]
    rows += [
        (name.replace("_", " "), f"{share.passed:.3f}", f"{share.exact:.3f}", str(share.count))
        for name, share in parts
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([lines[0], rule.replace(":", "-", 1), *lines[1:]])


def check_detector() -> tuple[Scores, Scores]:
    """The detector against the truth: one drawing for each evaluation prompt.

    Returns:
      The score of the drawings for their own prompts, and for the same prompts shuffled within
      their categories, no drawing keeping its own.
    """
    prompts = load_prompts()
    rng = np.random.default_rng(0)
    scenes, placed = realise([prompt.spec for prompt in prompts], rng, keep_held_out_unseen=False)
    if not placed.all():
        raise AssertionError(f"{int((~placed).sum())} evaluation prompts found no drawing")
    images = to_uint8(render(scenes))
    shuffled = list(prompts)
    for category in CATEGORIES:
        rows = [row for row, prompt in enumerate(prompts) if prompt.category == category]
        order = rng.permutation(rows)  # one cycle through all rows: nothing stays in place
        for row, other in zip(order, np.roll(order, 1), strict=True):
            shuffled[row] = prompts[other]
    detections = [detect(image) for image in images]
    return score_detections(detections, prompts), score_detections(detections, shuffled)
