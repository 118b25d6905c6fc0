"""The sections of a run's page, but for its pictures and charts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from ternary.distillation.run_config import RunConfig
from ternary.run_report.folder import Run, finite
from ternary.run_report.markup import Child, element, section, table
from ternary.run_report.scores import Column
from ternary.storage.inspection import Report

# Settings of the command line, before those of `RunConfig`.
TASK = ("teacher", "teacher_crc32", "prompts", "prompts_crc32", "held_out_prompts", "start")


def heading(name: str, run: Run) -> Element:
    """Name and state of the run."""
    wanted = f" of {run.wanted:,}" if run.wanted else ""
    written = f"{run.written:%Y-%m-%d %H:%M} UTC" if run.written else ""
    if run.finished:
        state, kind = f"Finished: {run.steps:,} steps.", "good"
    elif run.steps and run.steps == run.wanted:
        state, kind = f"All {run.steps:,} steps are taken; student/ is not in the folder.", "open"
    elif run.steps:
        start = f" from step {run.checkpoints[-1]:,}" if run.checkpoints else ""
        state = (
            f"Not finished: step {run.steps:,}{wanted}, reported {written}. It still runs, or was "
            f"stopped there; the same command goes on{start}."
        )
        kind = "open"
    else:
        state, kind = f"No step{wanted} is reported yet.", "open"
    return element(
        "header",
        element("p", "1.58-bit FLUX: a distillation run", class_="kicker"),
        element("h1", name),
        element("p", state, class_=f"state {kind}"),
    )


def tiles(run: Run, columns: Sequence[Column], student: Report | None) -> Element | None:
    """The figures that one looks for first."""
    found: list[tuple[str, str, str]] = []
    if student is not None:
        found += [
            (
                "bits a parameter",
                f"{student.bits_per_parameter:.2f}",
                _stored(student),
            ),
            (
                "transformer",
                _bytes(student.nbytes),
                f"{student.smaller:.1f} times smaller than bf16 ({_bytes(2 * student.parameters)})",
            ),
            (
                "ternary",
                f"{student.ternary_fraction:.1%}",
                f"of the parameters; {student.zeros:.1%} of those are 0",
            ),
        ]
    ours, theirs = _overall(run, columns)
    if ours is not None and theirs is not None:
        kept = f"{ours / theirs:.1%} kept; " if theirs else ""
        found.append(("composition score", f"{ours:.3f}", f"{kept}teacher {theirs:.3f}"))
    psnr = finite(run.held_out.get("median_psnr_db"))
    if len(psnr):
        note = f"PSNR against the teacher's, median; at first {psnr[0]:.1f} dB"
        found.append(("held-out pictures", f"{psnr[-1]:.1f} dB", note))
    relative = finite(run.metrics.get("relative"))
    if len(relative):
        tail = relative[-50:]
        note = f"mean of the last {len(tail)} rows" if len(tail) > 1 else "one row"
        found.append(("relative error", f"{tail.mean():.3f}", f"of the velocity, {note}"))
    if not found:
        return None
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", element("b", value), element("span", note)),
            )
            for name, value, note in found
        ),
        class_="tiles",
    )


def _stored(student: Report) -> str:
    """At how many bits its ternary layers are, and at how many the rest."""
    sizes = [math.prod(layer.shape) for layer in student.layers]
    each = [f"{bits(layer.bits for layer in student.layers):.2f}" for bits in (min, max)]
    note = f"ternary layers at {'-'.join(dict.fromkeys(each))} bits"
    rest = student.parameters - sum(sizes)
    if not rest:
        return note
    inside = sum(layer.bits * size for layer, size in zip(student.layers, sizes, strict=True))
    return (
        f"{note}, the other {rest / student.parameters:.1%} of all {_large(student.parameters)} "
        f"parameters at {(8 * student.nbytes - inside) / rest:.3g}"
    )


def _overall(run: Run, columns: Sequence[Column]) -> tuple[float | None, float | None]:
    """The student's and the teacher's score: of these columns, else of the run's last drawing."""
    by_kind = {column.kind: column.overall for column in columns}
    if columns:
        return by_kind.get("student"), by_kind.get("teacher")
    ours, theirs = (finite(run.held_out.get(name)) for name in ("score", "teacher_score"))
    return (float(ours[-1]), float(theirs[-1])) if len(ours) and len(theirs) else (None, None)


def missing(run: Run, student: Report | None) -> Element | None:
    """What the page cannot show."""
    lines = list(run.missing)
    if student is None and not run.finished:
        lines.append("There is no student yet: zeros, error and size by layer are not known.")
    if not lines:
        return None
    return element(
        "aside",
        element("h2", "Not in this report"),
        element("ul", *(element("li", line) for line in lines)),
    )


def scores(columns: Sequence[Column], run: Run) -> Element:
    """Composition score by category."""
    title = "Composition score"
    if not columns:
        overall = finite(run.held_out.get("score"))
        state = "This run's held-out prompts have no score. "
        if len(overall):
            state = (
                f"Overall {overall[-1]:.3f} at the last drawing (its course is below); this run "
                "recorded no categories. "
            )
        return section(
            title,
            element(
                "p",
                state,
                element("code", "python -m ternary report RUN --score"),
                " draws the composition prompts with teacher, student and plain rounding; ",
                element("code", "--held-out composition"),
                " scores them during a run.",
            ),
        )
    names = ["overall", *columns[0].scores["categories"]]
    rows: list[list[Child]] = []
    for name in names:
        cells = [_bar(column, name) for column in columns]
        label = "overall (mean)" if name == "overall" else name.replace("_", " ")
        rows.append([label, *cells])
    counts = "; ".join(f"{column.name}: {column.count:,} pictures" for column in columns)
    note = (
        "Share of pictures that show what the prompt says, judged by an exact detector; from the "
        f"same noise. {counts}."
    )
    heads = ["category", *(column.name for column in columns)]
    return section(title, table(heads, rows, class_="scores"), element("p", note, class_="note"))


def _bar(column: Column, name: str) -> Child:
    categories = column.scores["categories"]
    share = column.scores["overall"] if name == "overall" else categories.get(name)
    if share is None:
        return "-"
    passed = float(share["passed"])
    width = f"width:{100 * min(max(passed, 0.0), 1.0):.1f}%"
    bar = element("span", element("i", class_=column.kind, style=width), class_="bar")
    return element("div", element("span", f"{passed:.3f}"), bar, class_="cell")


def settings(run: Run) -> Element | None:
    """What the run is about and what differs from the defaults; and every setting."""
    if not run.settings:
        return None
    defaults = {name: _plain(v) for name, v in _flat(dataclasses.asdict(RunConfig())).items()}
    values = {name: _plain(v) for name, v in _flat(run.settings).items()}
    order = sorted(values, key=lambda name: (name not in TASK, "." in name, name))
    chosen = [name for name in order if values[name] != defaults.get(name, "-")]
    heads = ["setting", "value", "default"]
    every: list[list[Child]] = [[name, values[name], defaults.get(name, "")] for name in order]
    rows = [row for row in every if row[0] in chosen]
    return section(
        "Settings",
        element("p", "What is not the default.", class_="note"),
        table(heads, rows, class_="settings"),
        element(
            "details",
            element("summary", f"All {len(every)} settings"),
            table(heads, every, class_="settings"),
        ),
    )


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{where}{name}.") if inner else {f"{where}{name}": value}
    return found


def _plain(value: Any) -> str:
    """A value as one line."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _large(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
