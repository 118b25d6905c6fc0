"""Line and range charts: an SVG that stretches, with its labels as text beside it.

The SVG has no text, so that it can be stretched to any width while the labels keep their size.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import Bool, Float

from ternary.run_report.markup import element

# A chart is drawn from so many points at most; each is the mean of its share of the steps.
POINTS = 300
# Of the SVG's own coordinates.
SIDE = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
      name: in the legend.
      kind: "teacher", "student", "rounded" or "other", which is its colour.
      x, y: points; a `y` that is not finite is a gap.
      low, high: a band around the line, or None.
    """

    name: str
    kind: str
    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    low: Float[np.ndarray, " N"] | None = None
    high: Float[np.ndarray, " N"] | None = None


def thinned(
    name: str,
    kind: str,
    x: Float[np.ndarray, " N"],
    y: Float[np.ndarray, " N"],
) -> Line:
    """A line of at most `POINTS` points, its band the lowest and highest value of each."""
    if len(x) <= POINTS:
        return Line(name=name, kind=kind, x=x, y=y)
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)
    parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]

    def of_each(function: Callable[[np.ndarray], float], values: np.ndarray) -> np.ndarray:
        # A point that covers one value that is not finite is not finite.
        return np.array([function(values[part]) for part in parts])

    return Line(
        name=name,
        kind=kind,
        x=of_each(np.max, x),
        y=of_each(np.mean, y),
        low=of_each(np.min, y),
        high=of_each(np.max, y),
    )


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values to coordinates, 0 to `SIDE`.

    Attributes:
      low, high: the ends, in values.
      log: whether it is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Float[np.ndarray, " N"], *, log: bool = False) -> Axis | None:
        """An axis with room for all finite values (all positive ones); None without any."""
        kept = values[np.isfinite(values) & (values > 0 if log else np.full(values.shape, True))]
        if not len(kept):
            return None
        low, high = float(kept.min()), float(kept.max())
        if log:
            room = max((high / low) ** 0.05, 1.05)
            return cls(low / room, high * room, True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        # A quantity that is never negative gets no room below zero.
        return cls(max(low - room, 0.0) if low >= 0 else low - room, high + room)

    def place(self, values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Coordinates; NaN for what has no place."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                values = np.log(np.where(values > 0, values, np.nan) / self.low)
                found = values / math.log(self.high / self.low)
            else:
                found = (values - self.low) / ((self.high - self.low) or 1.0)
        return np.where(np.isfinite(found), found, np.nan) * SIDE

    def ticks(self, count: int = 5) -> list[float]:
        """Round values on the axis, about `count`."""
        found: list[float] = []
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1.0,) if len(powers) > 4 else (1.0, 2.0, 5.0)
            every = max(1, len(powers) // count)
            found = [f * 10.0**p for p in powers if p % every == 0 for f in factors]
            found = [value for value in found if self.low <= value <= self.high]
        # Between two powers of ten there may be too few.
        if not self.log or len(found) < 2:
            rough = (self.high - self.low) / count or 1.0
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
            first = math.ceil(self.low / step)
            found = [(first + i) * step for i in range(math.floor(self.high / step) - first + 1)]
        return [value for value in found if self.low <= value <= self.high]


def line_chart(
    title: str, lines: Sequence[Line], *, log: bool = False, unit: str = "", note: str = ""
) -> Element:
    """A chart over the steps.

    Args:
      title: above it.
      lines: at least one.
      log: whether the vertical axis is logarithmic.
      unit: of the values, as "dB".
      note: below it.
    """
    bands = [band for line in lines for band in (line.low, line.high) if band is not None]
    up = Axis.around(np.concatenate([*(line.y for line in lines), *bands]), log=log)
    wrong = sorted({float(x) for line in lines for x in line.x[~np.isfinite(line.y)]})
    if up is None:
        return element(
            "figure",
            element("figcaption", element("h3", title)),
            element("p", "No value can be drawn.", class_="note"),
            class_="chart",
        )
    steps = np.concatenate([line.x for line in lines])
    across = Axis(float(steps.min()), float(steps.max()))
    drawing = [path for line in lines for path in _paths(line, across, up)]
    drawing += [
        element("path", d=f"M{x:.1f} 0V{SIDE:g}", class_="wrong")
        for x in across.place(np.array(wrong))
    ]
    notes = [note, f"Logarithmic scale{', ' + unit if unit else ''}." if log else ""]
    if wrong:
        notes.append(f"Not finite at step {wrong[0]:,.0f}" + _more(len(wrong) - 1) + ".")
    data = [
        {"name": line.name, "points": _points(line, across, up)} for line in lines if len(line.x)
    ]
    return _frame(title, lines, drawing, _ends(across), across, up, unit, notes, data)


def _ends(axis: Axis) -> list[float]:
    """The two ends of an axis, and round values that are not too near to them."""
    near = 0.14 * (axis.high - axis.low)
    between = [v for v in axis.ticks(4) if axis.low + near < v < axis.high - near]
    return sorted({axis.low, *between, axis.high})


def _more(count: int) -> str:
    return f" and {count:,} more" if count else ""


def _points(line: Line, across: Axis, up: Axis) -> list[list[float | str]]:
    """For the reader's pointer: place in percent, step and value."""
    places = zip(across.place(line.x) / 10, 100 - up.place(line.y) / 10, strict=True)
    return [
        [round(float(left), 2), round(float(top), 2), f"{x:,.0f}", f"{y:.4g}"]
        for (left, top), x, y in zip(places, line.x, line.y, strict=True)
        if math.isfinite(top)
    ]


def _paths(line: Line, across: Axis, up: Axis) -> list[Element]:
    x, y = across.place(line.x), SIDE - up.place(line.y)
    found = []
    if line.low is not None and line.high is not None:
        # On a logarithmic axis a lowest value of zero is at the bottom.
        low = np.nan_to_num(SIDE - up.place(line.low), nan=SIDE)
        high = SIDE - up.place(line.high)
        for part in _runs(np.isfinite(high)):
            there = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[part], high[part], strict=True))
            back = zip(x[part][::-1], low[part][::-1], strict=True)
            d = f"M{there} L" + " ".join(f"{a:.1f},{b:.1f}" for a, b in back) + "Z"
            found.append(element("path", d=d, class_=f"band {line.kind}"))
    for part in _runs(np.isfinite(y)):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[part], y[part], strict=True))
        # A point alone is a line of no length, which round ends make visible.
        d = f"M{points}" + ("h0" if part.stop - part.start == 1 else "")
        found.append(element("path", d=d, class_=f"line {line.kind}"))
    return found


def _runs(good: Bool[np.ndarray, " N"]) -> list[slice]:
    """The stretches without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], good.astype(int), [0]))))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def range_chart(
    title: str,
    names: Sequence[str],
    lines: Sequence[Line],
    *,
    unit: str = "",
    note: str = "",
) -> Element:
    """A dot with its range for each of some things side by side.

    Args:
      title: above it.
      names: of the things.
      lines: `x` counts the things from 0, `low` and `high` are the ranges.
      unit: of the values.
      note: below it.
    """
    across = Axis(-0.5, len(names) - 0.5)
    ends = [end for line in lines for end in (line.low, line.high) if end is not None]
    up = Axis.around(np.concatenate(ends))
    assert up is not None
    drawing = []
    for number, line in enumerate(lines):
        assert line.low is not None
        assert line.high is not None
        shift = (number - (len(lines) - 1) / 2) * 0.24
        x = across.place(line.x + shift)
        parts = zip(x, *(SIDE - up.place(v) for v in (line.low, line.high, line.y)), strict=True)
        for left, low, high, middle in parts:
            drawing += [
                element("path", d=f"M{left:.1f} {low:.1f}V{high:.1f}", class_=f"range {line.kind}"),
                element("path", d=f"M{left:.1f} {middle:.1f}h0", class_=f"dot {line.kind}"),
            ]
    every = -(-len(names) // 12)
    ticks = [float(index) for index in range(0, len(names), every)]
    data = [
        {
            "name": line.name,
            "points": [
                [point[0], point[1], names[int(x)], f"{y:.4g}"]
                for point, x, y in zip(_points(line, across, up), line.x, line.y, strict=True)
            ],
        }
        for line in lines
    ]
    return _frame(title, lines, drawing, ticks, across, up, unit, [note], data, names)


def _frame(
    title: str,
    lines: Sequence[Line],
    drawing: Sequence[Element],
    steps: Sequence[float],
    across: Axis,
    up: Axis,
    unit: str,
    notes: Sequence[str],
    data: list[dict[str, object]],
    names: Sequence[str] = (),
) -> Element:
    """Axes, legend and notes around a drawing."""
    levels = up.ticks()
    heights = SIDE - up.place(np.array(levels))
    grid = [element("path", d=f"M0 {y:.1f}H{SIDE:g}", class_="grid") for y in heights]
    svg = element(
        "svg",
        *grid,
        *drawing,
        viewBox=f"0 0 {SIDE:g} {SIDE:g}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    y_labels = [
        element("span", f"{level:g}", style=f"top:{y / 10:.2f}%")
        for level, y in zip(levels, heights, strict=True)
    ]
    x_labels = [
        element("span", names[int(x)] if names else f"{x:,.0f}", style=f"left:{place / 10:.2f}%")
        for x, place in zip(steps, across.place(np.array(steps)), strict=True)
    ]
    legend = [
        element("li", element("i", class_=f"key {line.kind}"), f" {line.name}") for line in lines
    ]
    plot = element(
        "div",
        svg,
        element("div", class_="cursor", hidden=True),
        class_="plot",
        tabindex="0",
        role="group",
        aria_label=f"{title}. Left and right arrow keys read the values.",
        data_series=json.dumps(data),
    )
    return element(
        "figure",
        element(
            "figcaption",
            element("h3", title, element("small", f" {unit}") if unit else None),
            element("ul", *legend, class_="legend") if len(lines) > 1 else None,
        ),
        element(
            "div",
            element("div", *y_labels, class_="y", aria_hidden="true"),
            plot,
            element("div", *x_labels, class_="x" if names else "x steps", aria_hidden="true"),
            class_="frame",
        ),
        element("p", " ".join(filter(None, notes)), class_="note"),
        element("p", class_="reading", aria_live="polite"),
        class_="chart",
    )
