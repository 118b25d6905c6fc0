"""From a `jax.profiler.trace` folder to a table: device time by kind of operation, and by kernel.

    python -m benchmarks.trace_table FOLDER [--hlo FOLDER/step.hlo.txt.gz]

A GPU trace has one line per stream, whose events are kernels; a CPU trace has the executor's
threads, whose events are HLO operations. An event's kind comes from the compiled program when its
text is given (`compiled.as_text()`), and from its name otherwise.
"""

from __future__ import annotations

import dataclasses
import gzip
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import run
from flux_jax.errors import UserError

KINDS = ("matmul", "attention", "elementwise", "copy", "collective", "control")

_BY_NAME = (
    ("attention", re.compile(r"fmha|sdpa|flash|attention", re.I)),
    ("collective", re.compile(r"nccl|all[-_]?(reduce|gather|to[-_]?all)|reduce[-_]scatter", re.I)),
    ("matmul", re.compile(r"nvjet|cublas|cutlass|xmma|wgmma|gemm|gemv|(^|_)dot|matmul", re.I)),
    ("control", re.compile(r"^(while|call|conditional|tuple)\b", re.I)),
    (
        "copy",
        re.compile(r"memcpy|memset|^(wrapped_)?(copy|transpose|concatenate|slice|pad)(\b|_)", re.I),
    ),
)
_MOVES_ONLY = {
    "bitcast",
    "broadcast",
    "concatenate",
    "constant",
    "copy",
    "dynamic-slice",
    "dynamic-update-slice",
    "get-tuple-element",
    "pad",
    "parameter",
    "reshape",
    "reverse",
    "slice",
    "transpose",
    "tuple",
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One instruction of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      scope: where it comes from, "jit(step)/…/dot_general"; empty when the program does not say.
      shape: of its output.
    """

    kind: str
    scope: str
    shape: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Events of one name: total self time in nanoseconds, and how many."""

    name: str
    kind: str
    scope: str
    shape: str
    nanoseconds: float
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A trace summed up.

    Attributes:
      rows: by name, longest first.
      busy: nanoseconds during which at least one event ran.
      span: nanoseconds from the first event to the end of the last.
    """

    rows: tuple[Row, ...]
    busy: float
    span: float

    def by_kind(self) -> dict[str, float]:
        """Nanoseconds by kind, longest first."""
        totals: dict[str, float] = defaultdict(float)
        for row in self.rows:
            totals[row.kind] += row.nanoseconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def render(self, *, steps: int = 1, top: int = 25) -> str:
        """The table as text, times per step."""
        total = sum(row.nanoseconds for row in self.rows) or 1.0
        scale = 1e6 * steps
        lines = [f"{'ms/step':>9} {'share':>6}  kind"]
        for kind, time in self.by_kind().items():
            lines.append(f"{time / scale:9.3f} {time / total:6.1%}  {kind}")
        lines.append(
            f"busy {self.busy / scale:.3f} ms of {self.span / scale:.3f} ms per step "
            f"({self.busy / max(self.span, 1.0):.1%})"
        )
        lines.append("")
        lines.append(f"{'ms/step':>9} {'share':>6} {'calls':>7}  {'kind':11} name · shape · scope")
        for row in self.rows[:top]:
            label = " · ".join(filter(None, (row.name[:70], row.shape[:40], row.scope[-60:])))
            lines.append(
                f"{row.nanoseconds / scale:9.3f} {row.nanoseconds / total:6.1%} "
                f"{row.count / steps:7.1f}  {row.kind:11} {label}"
            )
        return "\n".join(lines)


def read_trace(folder: Path, program: Mapping[str, Operation] | None = None) -> Table:
    """Sums up the newest trace under `folder`.

    Args:
      folder: what was given to `jax.profiler.trace`.
      program: the compiled program's operations, from `read_program`.

    Raises:
      UserError: there is no trace under `folder`, or it holds no device event.
    """
    # By path: the profiler names its folders by date and time.
    traces = sorted(folder.rglob("*.xplane.pb"))
    if not traces:
        raise UserError(f"no *.xplane.pb under {folder}: was the profiler stopped?")
    import jax

    return summarise(jax.profiler.ProfileData.from_file(str(traces[-1])), program or {})


def summarise(profile: Any, program: Mapping[str, Operation]) -> Table:
    """Sums up a `jax.profiler.ProfileData`.

    Events can hold others (a loop and its body), so each counts for what is not inside another.

    Raises:
      UserError: the profile holds no device event.
    """
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    labels: dict[str, tuple[str, str, str]] = {}
    intervals: list[tuple[float, float]] = []
    for events in _device_events(profile):
        intervals += [(start, end) for start, end, _, _ in events]
        for name, operation, own in _self_times(events):
            known = program.get(operation)
            key = f"{operation}: {name}" if operation and operation != name else name
            times[key] += own
            counts[key] += 1
            kind = known.kind if known else _kind_of_name(name, operation)
            labels[key] = (kind, known.scope if known else "", known.shape if known else "")
    if not intervals:
        raise UserError("the trace holds no device event: nothing ran between start and stop")
    rows = [
        Row(
            name=key,
            kind=labels[key][0],
            scope=labels[key][1],
            shape=labels[key][2],
            nanoseconds=time,
            count=counts[key],
        )
        for key, time in sorted(times.items(), key=lambda item: -item[1])
    ]
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return Table(rows=tuple(rows), busy=_union(intervals), span=span)


def read_program(text: str) -> dict[str, Operation]:
    """Kind, origin and output shape of every instruction in a compiled program's text."""
    opcodes: dict[str, set[str]] = defaultdict(set)
    found: list[tuple[str, str, str, str]] = []
    computation = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header.group(1)
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction:
            name, shape, opcode = instruction.groups()
            target = re.search(r'custom_call_target="([^"]*)"', line)
            opcodes[computation].add(target.group(1) if target else opcode)
            found.append((name, shape, opcode, line))
    program = {}
    for name, shape, opcode, line in found:
        scope = re.search(r'op_name="([^"]*)"', line)
        program[name] = Operation(
            kind=_kind_of_instruction(name, opcode, line, opcodes),
            scope=scope.group(1) if scope else "",
            shape=re.sub(r"\{[^}]*\}", "", shape),
        )
    return program


def _kind_of_instruction(name: str, opcode: str, line: str, opcodes: Mapping[str, set[str]]) -> str:
    if opcode in ("while", "call", "conditional"):
        return "control"
    target = re.search(r'custom_call_target="([^"]*)"', line)
    if target:
        return _kind_of_name(target.group(1), name)
    if opcode != "fusion":
        inside = {opcode}
    else:
        called = re.search(r"calls=%?([\w.\-]+)", line)
        inside = opcodes.get(called.group(1), set()) if called else set()
    if inside & {"dot", "convolution"} or '"kind":"__triton_gemm"' in line:
        # A fused softmax between two products is attention.
        return "attention" if "exponential" in inside and "reduce" in inside else "matmul"
    if inside and inside <= _MOVES_ONLY:
        return "copy"
    kind = _kind_of_name(opcode, "")
    return kind if kind == "collective" else "elementwise"


def _kind_of_name(name: str, operation: str) -> str:
    for text in (name, operation):
        for kind, pattern in _BY_NAME:
            if text and pattern.search(text):
                return kind
    return "elementwise"


def _device_events(profile: Any) -> list[list[tuple[float, float, str, str]]]:
    """(start, end, name, HLO operation) by stream (GPU) or executor thread (CPU)."""
    with warnings.catch_warnings():
        # JAX 0.11 on Python 3.12 warns of a type of its own at the first access; were warnings
        # errors, as in the tests, that would abort the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        planes = list(profile.planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        return [
            events
            for plane in devices or planes
            for events in _plane_events(list(plane.lines))
            if events
        ]


def _plane_events(lines: list[Any]) -> Iterable[list[tuple[float, float, str, str]]]:
    # A GPU plane may carry lines derived from the streams; they would count twice.
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or lines:
        events = []
        for event in line.events:
            operation = str(dict(event.stats).get("hlo_op", ""))
            if event.duration_ns > 0 and (operation or streams):
                end = event.start_ns + event.duration_ns
                events.append((event.start_ns, end, event.name, operation))
        yield events


def _self_times(
    events: Iterable[tuple[float, float, str, str]],
) -> list[tuple[str, str, float]]:
    """Each event's duration without that of the events inside it."""
    ordered = sorted(events, key=lambda event: (event[0], -event[1]))
    own = [end - start for start, end, _, _ in ordered]
    stack: list[int] = []
    for index, (start, end, _, _) in enumerate(ordered):
        while stack and ordered[stack[-1]][1] <= start:
            stack.pop()
        if stack and end <= ordered[stack[-1]][1]:
            own[stack[-1]] -= end - start
        stack.append(index)
    return [(name, op, time) for (_, _, name, op), time in zip(ordered, own, strict=True)]


def _union(intervals: list[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main(
    folder: Annotated[Path, typer.Argument(help="The folder given to jax.profiler.trace.")],
    hlo: Annotated[
        Path | None,
        typer.Option(help="The compiled program's text, gzipped.", exists=True, dir_okay=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="How many steps the trace holds.")] = 1,
    top: Annotated[int, typer.Option(help="How many kernels to list.")] = 25,
) -> None:
    """Prints where the time of a profiled program goes."""
    text = gzip.decompress(hlo.read_bytes()).decode() if hlo else ""
    program = read_program(text)
    print(read_trace(folder, program).render(steps=steps, top=top))


if __name__ == "__main__":
    run(main)
