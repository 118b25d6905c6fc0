"""The page of a run: its sections in order, in one HTML text that asks nothing of any network."""

from __future__ import annotations

import datetime
import string
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element

from flux_jax import __version__
from flux_jax.files import write_whole
from ternary.run_report import chart_sections, picture_sections, sections
from ternary.run_report.folder import Run
from ternary.run_report.layers import Distance
from ternary.run_report.markup import element, json_in_html, to_html
from ternary.run_report.pictures import galleries
from ternary.run_report.scores import Evaluations, run_scores
from ternary.storage.inspection import Report


def render(
    run: Run,
    evaluations: Evaluations,
    student: Report | None,
    distances: Mapping[str, Distance],
    *,
    now: datetime.datetime,
) -> str:
    """A run as HTML.

    Args:
      run: what its folder holds.
      evaluations: what `--score` left in it.
      student: the student's layers; None where there is no student.
      distances: of its layers from the teacher's; empty where the teacher is not here.
      now: printed on the page.
    """
    name = run.folder.resolve().name
    columns = list(evaluations.columns) if evaluations.complete else run_scores(run)
    pictures = galleries(run, evaluations)
    parts = [
        sections.heading(name, run),
        sections.tiles(run, columns, student),
        sections.missing(run, student),
        sections.scores(columns, run),
        picture_sections.pictures(pictures),
        chart_sections.curves(run),
        chart_sections.layers(student, distances),
        sections.settings(run),
    ]
    footer = element(
        "p",
        f"Written {now:%Y-%m-%d %H:%M} UTC by python -m ternary report, flux-jax {__version__}.",
    )
    # The last view is in the pictures themselves.
    views = [
        {view: [pair.students[view] for pair in each.pairs] for view in list(each.views)[:-1]}
        for each in pictures
    ]
    return string.Template(_asset("page.html")).substitute(
        title=_text(f"{name}: distillation run"),
        style=_asset("page.css"),
        script=_asset("page.js"),
        body=to_html(*_present(parts)),
        footer=to_html(footer),
        views=json_in_html(views),
    )


def write_page(target: Path, page: str) -> None:
    """Write the file, complete or not at all.

    Raises:
      UserError: it cannot be written.
    """
    # Characters that no encoding has, as of a broken file name, become question marks.
    write_whole(target, page.encode(errors="replace"))


def _present(parts: Sequence[Element | None]) -> list[Element]:
    return [part for part in parts if part is not None]


def _text(text: str) -> str:
    """Escaped, for a place in the template."""
    return to_html(element("i", text)).removeprefix("<i>").removesuffix("</i>")


def _asset(name: str) -> str:
    return files("ternary.run_report").joinpath("assets", name).read_text("utf-8")
