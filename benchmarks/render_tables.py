"""Writes the measured tables of the README and of docs/ from the result files.

    python -m benchmarks.render_tables          # rewrite
    python -m benchmarks.render_tables --check  # exit code 1 if they are out of date

A table stands between `<!-- results: NAME -->` and `<!-- /results -->`; NAME is a benchmark's. A
table has a column for ours and one for each peer of the same run, or, where figures are called
`row/measure`, a column for each measure.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, Result, read_result, run
from benchmarks.layouts import LAYOUTS, Layout
from benchmarks.machine import REPOSITORY

DOCUMENTS = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- /results -->)", re.S)


def render_result(result: Result, images: str = "docs/images") -> str:
    """One result as a Markdown table, with a line on where and how it was measured.

    Args:
      result: of one benchmark on one device.
      images: the folder docs/images, as the document sees it.
    """
    layout = LAYOUTS.get(result.benchmark)
    if layout is not None and layout.columns:
        lines = [*_targets(result, layout), *_matrix(result, layout), "", _source(result)]
        if layout.image and _image(layout).exists():
            lines += ["", f"![{layout.title}]({images}/{layout.image})"]
        return "\n".join(lines)
    if layout is not None and layout.compared:
        return "\n".join([*_comparison(result, layout), "", _source(result)])
    columns = {"ours": result.figures, **{name: p.figures for name, p in result.peers.items()}}
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = layout.rows if layout else tuple((name, name.replace("_", " ")) for name in names)
    # A peer whose figures only enter others' has no column.
    columns = {
        name: figures
        for name, figures in columns.items()
        if name == "ours" or any(row in figures for row, _ in rows)
    }
    title = layout.title if layout else result.benchmark.replace("_", " ")
    lines = [
        f"| {title} | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, label in rows:
        cells = []
        for figures in columns.values():
            figure = figures.get(name)
            cells.append(_cell(figure.value, figure.unit) if figure else "")
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _source(result)])


def _image(layout: Layout) -> Path:
    return REPOSITORY / "docs" / "images" / layout.image


def _targets(result: Result, layout: Layout) -> list[str]:
    """What was found beside what was to be reached; what was not measured says so."""
    if not layout.targets:
        return []
    lines = [
        f"| {layout.title} | 1.58-bit FLUX | target | measured |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, label, paper, reach in layout.targets:
        figure = result.figures.get(name)
        found = _cell(figure.value, figure.unit) if figure else "not measured yet"
        lines.append(f"| {label} | {paper} | {reach} | {found} |")
    return [*lines, ""]


def _comparison(result: Result, layout: Layout) -> list[str]:
    """Each variant's figure beside its limit and what was to be reached."""
    headings = ["limit", "target", *layout.variants]
    lines = [f"| {layout.title} | " + " | ".join(headings) + " |"]
    lines.append("| --- |" + " ---: |" * len(headings))
    for label, limit, reach, names in layout.compared:
        figures = [result.figures.get(name) for name in names]
        cells = [_cell(figure.value, figure.unit) if figure else "" for figure in figures]
        if any(cells):
            lines.append(f"| {label} | {limit} | {reach} | " + " | ".join(cells) + " |")
    return lines


def _matrix(result: Result, layout: Layout) -> list[str]:
    """A row for each first half of the figures' names, a column for each second half."""
    peers = {
        f"{peer}/{name}": figure
        for peer, content in result.peers.items()
        for name, figure in content.figures.items()
    }
    everything = {**result.figures, **peers}
    lines = [
        f"| {layout.title} | " + " | ".join(label for _, label in layout.columns) + " |",
        "| --- |" + " ---: |" * len(layout.columns),
    ]
    drawn = layout.drawn if layout.drawn and _image(layout).exists() else None
    for row in dict.fromkeys(name.rpartition("/")[0] for name in everything if "/" in name):
        if drawn and re.fullmatch(drawn, row):
            continue
        figures = [everything.get(f"{row}/{measure}") for measure, _ in layout.columns]
        cells = [_cell(figure.value, figure.unit) if figure else "" for figure in figures]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def render_benchmark(name: str, directory: Path = RESULTS, images: str = "docs/images") -> str:
    """All results of one benchmark, one table per device."""
    results = [read_result(path) for path in sorted(directory.glob(f"{name}_*.json"))]
    tables = [render_result(result, images) for result in results if result.benchmark == name]
    return "\n\n".join(tables) or "Not measured yet."


def render(text: str, directory: Path = RESULTS, images: str = "docs/images") -> str:
    """`text` with every marked block rewritten; `images` as in `render_result`."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{render_benchmark(match[2], directory, images)}\n{match[3]}"

    return _BLOCK.sub(replace, text)


def render_document(path: Path) -> str:
    """A document's text with every marked block rewritten."""
    inside = path.parent.name == "docs"
    text = path.read_text(encoding="utf-8")
    return render(text, images="images" if inside else "docs/images")


def _cell(value: float, unit: str) -> str:
    if unit == "yes":
        return "yes" if value else "no"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    number = f"{value:,.{digits}f}"
    return number if unit in ("count", "share", "") else f"{number} {unit}"


def _source(result: Result) -> str:
    hardware = result.hardware
    where = result.device
    if "driver" in hardware:
        where += f" (driver {hardware['driver']})"
    versions = [f"JAX {result.versions['jax']}"] if "jax" in result.versions else []
    for peer in result.peers.values():
        theirs = {n: v for n, v in peer.versions.items() if result.versions.get(n) != v}
        versions += [f"{name} {v}" for name, v in theirs.items() if name != "python"]
    parts = [where, *dict.fromkeys(versions), result.date, *_commits_and_command(result)]
    layout = LAYOUTS.get(result.benchmark, Layout(title=""))
    return f"{layout.how} " + ", ".join(parts) + "."


def _commits_and_command(result: Result) -> tuple[str, str]:
    """The commits of all joined results, and what was run: without them, and where it went."""
    option = r" --(commit|out)[ =]('[^']*'|\S+)"
    named = [value for name, value in re.findall(option, result.command) if name == "commit"]
    commits = dict.fromkeys(short(commit.strip("'")) for commit in (result.commit, *named))
    begin = r" and (?=(?:[A-Z_]+=(?:'[^']*'|\S+) )*python )"
    calls = re.split(begin, re.sub(option, "", result.command))
    label = "commit" if len(commits) == 1 else "commits"
    return f"{label} {', '.join(commits)}", f"`{' and '.join(dict.fromkeys(calls))}`"


def short(commit: str) -> str:
    """A commit with what is said of it, its hash cut to seven digits."""
    return re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", commit)


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the tables are current.")
    ] = False,
) -> None:
    """Writes the tables of the README and of docs/ from benchmarks/results."""
    for path in DOCUMENTS:
        before, after = path.read_text(encoding="utf-8"), render_document(path)
        if before == after:
            continue
        if check:
            raise SystemExit(
                f"error: {path.name} is out of date: run python -m benchmarks.render_tables"
            )
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    run(main)
