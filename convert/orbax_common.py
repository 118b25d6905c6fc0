"""What reading and writing Orbax checkpoints share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` to `{"a": {"b": x}}`: the tree of an Orbax checkpoint."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        level = tree
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`; lists and tuples count as levels named by index."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """No warnings about options (OCDBT, sharding files) that are off on purpose."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
