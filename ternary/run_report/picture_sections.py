"""The section of a run's page that shows what teacher and student draw.

Both are seen whole, side by side, without a script; with one there are the slider and other
students to choose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ternary.run_report.markup import element, section
from ternary.run_report.pictures import Gallery, Pair

# How pairs are shown, the one to begin with first; page.css knows the second by name.
MODES = ("side by side", "slider")


def pictures(galleries: Sequence[Gallery]) -> Element | None:
    """Teacher and student from the same noise; None without any picture."""
    if not galleries:
        return None
    return section(
        "Teacher and student, from the same noise",
        *(_pairs(gallery, number) for number, gallery in enumerate(galleries)),
    )


def _pairs(gallery: Gallery, number: int) -> Element:
    """A gallery; its number tells its controls from those of others."""
    shown = list(gallery.views)[-1]
    note = element(
        "p",
        f"{len(gallery.pairs)} of {gallery.of} {gallery.prompts}.",
        element(
            "span",
            " Teacher left of the line: drag it, or use the arrow keys.",
            class_="sliding",
        ),
        class_="note",
    )
    choices = [
        element("option", view, value=view, selected=view == shown, data_label=label)
        for view, label in gallery.views.items()
    ]
    modes = [
        element(
            "label",
            element("input", type="radio", name=f"mode-{number}", value=mode, checked=not index),
            element("span", mode),
        )
        for index, mode in enumerate(MODES)
    ]
    controls = element(
        "div",
        element("label", f"{gallery.choice} ", element("select", *choices))
        if len(choices) > 1
        else None,
        element(
            "div",
            *modes,
            class_="modes",
            role="radiogroup",
            aria_label=f"{gallery.title}: how teacher and student are shown",
        ),
        element(
            "label",
            "All lines ",
            element("input", type="range", min="0", max="100", value="50", class_="all-lines"),
            class_="sliding",
        ),
        class_="controls",
        # Without the page's script they would do nothing.
        hidden=True,
    )
    pairs = (_pair(pair, shown, gallery.views[shown]) for pair in gallery.pairs)
    return element(
        "div",
        element("h3", gallery.title),
        note,
        controls,
        element("div", *pairs, class_="pairs"),
        class_="gallery",
    )


def _pair(pair: Pair, view: str, label: str) -> Element:
    width, height = pair.size
    slider = element(
        "input",
        type="range",
        min="0",
        max="100",
        value="50",
        aria_label=f"How much of the teacher's picture is seen, in percent: {pair.prompt}",
    )
    inside = [
        element(
            "img",
            src=source,
            alt=f"{name}: {pair.prompt}",
            width=width,
            height=height,
            class_=kind,
        )
        for kind, name, source in (
            ("teacher", "teacher", pair.teacher),
            ("student", label, pair.students[view]),
        )
    ]
    inside += [
        element("span", name, class_=f"label {kind}", aria_hidden="true")
        for kind, name in (("teacher", "teacher"), ("student", label))
    ]
    notes = json.dumps(pair.notes)
    note = element("span", pair.notes[view], class_="verdict", data_notes=notes)
    return element(
        "figure",
        element("div", *inside, element("span", class_="cut"), slider, class_="compare"),
        element("figcaption", pair.prompt, element("small", f"seed {pair.seed} · ", note)),
        class_="pair",
    )
