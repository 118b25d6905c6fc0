"""For the reference: a description of several names at once counts for each of them.

Our docstrings say `height, width: pixels`; Griffe reads one name a line.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_GROUP = re.compile(r"^(\s+)(\w+(?:, \w+)+): (.*)$")


def one_each(text: str) -> str:
    """`text` with every grouped line, and what goes on below it, repeated for each name."""
    lines, done = text.split("\n"), []
    while lines:
        match = _GROUP.match(lines[0])
        if match is None:
            done.append(lines.pop(0))
            continue
        first = lines.pop(0)
        indent = len(first) - len(first.lstrip())
        below = []
        while lines and len(lines[0]) - len(lines[0].lstrip()) > indent and lines[0].strip():
            below.append(lines.pop(0))
        for name in match[2].split(", "):
            done += [f"{match[1]}{name}: {match[3]}", *below]
    return "\n".join(done)


class GroupedNames(griffe.Extension):
    """Griffe's hook."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for everything that was read."""
        if obj.docstring is not None:
            obj.docstring.value = one_each(obj.docstring.value)
