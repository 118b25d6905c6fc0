"""The sections of a run's page that are charts: the training, and the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from ternary.run_report.charts import Line, line_chart, range_chart, thinned
from ternary.run_report.folder import Run, Sample, finite
from ternary.run_report.layers import Block, Distance, blocks, spread
from ternary.run_report.markup import Child, element, section, table
from ternary.storage.inspection import Report

# Of fewer pictures the lowest is told in place of a percentile.
PERCENTILE_OF = 10


def curves(run: Run) -> Element:
    """Loss, error, gradient, rate, and the held-out pictures over the steps."""
    charts = []
    steps = run.metrics.get("step", np.zeros(0))
    for name, title, log in (
        ("loss", "Loss", True),
        ("relative", "Relative error of the velocity", True),
        ("grad_norm", "Norm of the gradient", True),
        ("learning_rate", "Learning rate", False),
    ):
        if name in run.metrics and len(steps):
            line = thinned(title.lower(), "student", steps, run.metrics[name])
            each = -(-len(steps) // len(line.x))
            band = f"Means of up to {each} rows; the band is their range." if each > 1 else ""
            charts.append(line_chart(title, [line], log=log, note=band))
    drawn = run.held_out
    if "median_psnr_db" in drawn:
        median = Line(name="median", kind="student", x=drawn["step"], y=drawn["median_psnr_db"])
        low = _furthest(run)
        lines = [median] if low is None else [median, low]
        title = "Held-out pictures against the teacher's"
        charts.append(line_chart(title, lines, unit="dB", note="Higher is closer."))
    if len(finite(drawn.get("score"))):
        lines = [
            Line(name=kind, kind=kind, x=drawn["step"], y=drawn[column])
            for kind, column in (("teacher", "teacher_score"), ("student", "score"))
            if column in drawn
        ]
        charts.append(line_chart("Composition score", lines))
    if not charts:
        charts = [element("p", "Nothing is reported yet.")]
    return section("Training", element("div", *charts, class_="charts"))


def _furthest(run: Run) -> Line | None:
    """The 10th percentile of the held-out pictures; where they are too few for one, the lowest."""
    shown = {sample.step: _distances(sample) for sample in run.samples}
    told = {step: found for step, found in shown.items() if found and step in run.held_out["step"]}
    # The run shows all that it draws, of so few.
    if told and max(map(len, told.values())) < PERCENTILE_OF:
        steps = np.array(list(told), float)
        lowest = np.array([min(found) for found in told.values()])
        return Line(name="lowest", kind="other", x=steps, y=lowest)
    if "low_psnr_db" not in run.held_out:
        return None
    x, y = (run.held_out[name] for name in ("step", "low_psnr_db"))
    return Line(name="10th percentile", kind="other", x=x, y=y)


def _distances(sample: Sample) -> list[float]:
    """dB of each picture of a drawing; none where its legend does not say."""
    legend: Any = sample.legend
    try:
        return [float(pair["psnr_db"]) for pair in legend["shown"]]
    except (KeyError, TypeError, ValueError):
        return []


def layers(report: Report | None, distances: Mapping[str, Distance]) -> Element | None:
    """Zeros and error of the ternary layers, by block and one by one."""
    if report is None:
        return None
    parts = blocks(report)
    charts = [
        range_chart(
            "Zeros by block",
            [block.short for block in parts],
            [_blockwise("zeros", "student", parts, {x.name: x.zeros for x in report.layers})],
            note="Share of ternary weights that are 0. Dot: the block; line: from its lowest layer "
            f"to its highest. {_key(parts)}.",
        )
    ]
    errors = _errors(report, distances)
    if errors:
        lines = [_blockwise(name, kind, parts, values) for name, kind, values in errors]
        note = (
            "Norm of the difference from the teacher's weight, over the weight's. Training moves "
            "weights away from the teacher's: a higher error here is no worse picture."
        )
        names = [block.short for block in parts]
        charts.append(range_chart("Error of the weights by block", names, lines, note=note))
    heads = ["layer", "shape", "zeros", "mean scale", "bits"]
    heads += [f"error, {name}" for name, _, _ in errors]
    rows: list[list[Child]] = [
        [
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{layer.zeros:.1%}",
            f"{layer.scale:.4g}",
            f"{layer.bits:.3f}",
            *(
                f"{values[layer.name]:.3f}" if layer.name in values else "-"
                for *_, values in errors
            ),
        ]
        for layer in report.layers
    ]
    summary = f"{report.summary}."
    if not errors:
        summary += (
            " The error of the weights is not known: the teacher is not on this machine, or has "
            "layers of other shapes."
        )
    return section(
        "Layers",
        element("p", summary),
        element("div", *charts, class_="charts"),
        element("details", element("summary", "Every layer"), table(heads, rows)),
    )


def _key(parts: Sequence[Block]) -> str:
    """What the short names of these blocks stand for."""
    kinds = {"D": "double blocks", "S": "single blocks", "rest": "layers outside the blocks"}
    there = {block.short.rstrip("0123456789") for block in parts}
    return ", ".join(f"{short}: {kind}" for short, kind in kinds.items() if short in there)


def _errors(
    report: Report, distances: Mapping[str, Distance]
) -> list[tuple[str, str, dict[str, float]]]:
    """(name, kind, error by layer): against the teacher, else what the checkpoint itself says."""
    if distances:
        return [
            ("student", "student", {name: d.student for name, d in distances.items()}),
            ("plain rounding", "rounded", {name: d.rounded for name, d in distances.items()}),
        ]
    own = {x.name: x.relative_error for x in report.layers if x.relative_error is not None}
    return [("rounded", "rounded", own)] if own else []


def _blockwise(name: str, kind: str, parts: Sequence[Block], values: Mapping[str, float]) -> Line:
    rows = []
    for index, block in enumerate(parts):
        found = [values[layer.name] for layer in block.layers if layer.name in values]
        if found:
            mean, low, high = spread(found)
            rows.append((index, block.zeros if name == "zeros" else mean, low, high))
    x, y, low, high = np.array(rows, float).T
    return Line(name=name, kind=kind, x=x, y=y, low=low, high=high)
