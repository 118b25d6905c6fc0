"""The measured tiles: one JSON file per kind of device, in `tuned/` beside this file.

    {
      "device_kind": "NVIDIA H200",              // as JAX names it
      "entries": [
        {"backend": "mosaic",
         "m": 4608, "n": 21504, "k": 3072, "activation_bits": 8, "grouped": false,
         "kernel": "many", "tile": {"along_n": true},
         "ms": 0.4038, "jax": "0.11.2", "date": "2026-01-31"},
        …
      ]
    }

`kernel` names the kind of tile (`KERNELS`); fields of it that are not named have their default. An
entry is for its own m, n and k: which tile is best depends on how evenly the tiles go into the
multiprocessors. What no entry is for goes by the rules of `tiles`. `python -m pallas_kernels tune`
writes entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.errors import UserError
from pallas_kernels.files import write_whole
from pallas_kernels.tiles import (
    AnyTile,
    DirectTile,
    FewTile,
    Problem,
    Tile,
    TritonTile,
    mosaic_rule,
    triton_rule,
)

KERNELS: dict[str, type[AnyTile]] = {
    "many": Tile,
    "few": FewTile,
    "direct": DirectTile,
    "triton": TritonTile,
}
FOLDER = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What tiles are chosen for.

    Attributes:
      kind: JAX's `device_kind`.
      multiprocessors: of a GPU; 0 of anything else.
    """

    kind: str
    multiprocessors: int

    def without(self, some: int) -> Device:
        """With so many multiprocessors fewer, but one at least, if it has any."""
        left = max(self.multiprocessors - some, min(self.multiprocessors, 1))
        return dataclasses.replace(self, multiprocessors=left)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A measured tile: for which product on which backend, its time, and when it was measured."""

    backend: str
    problem: Problem
    tile: AnyTile
    ms: float
    jax: str
    date: str

    def to_json(self) -> dict[str, Any]:
        """As in the file; the tile's fields that have their default are left out."""
        tile = {
            field.name: getattr(self.tile, field.name)
            for field in dataclasses.fields(self.tile)
            if getattr(self.tile, field.name) != field.default
        }
        measured = {"ms": float(f"{self.ms:.4g}"), "jax": self.jax, "date": self.date}
        problem = dataclasses.asdict(self.problem)
        kernel = next(name for name, kind in KERNELS.items() if kind is type(self.tile))
        return {"backend": self.backend, **problem, "kernel": kernel, "tile": tile, **measured}


def mosaic_tile(
    problem: Problem, device: Device, *, run: int | None = None
) -> Tile | FewTile | DirectTile:
    """The Mosaic tile of a product: the table's, or what the rules say.

    Args:
      problem: the product.
      device: what it runs on.
      run: as for `mosaic_rule`.
    """
    entry = find("mosaic", problem, device.kind)
    if entry is not None and not isinstance(entry.tile, TritonTile):
        fits = run is None or not isinstance(entry.tile, Tile) or run % entry.tile.tokens == 0
        if fits:
            return entry.tile
    return mosaic_rule(problem, device.multiprocessors, run=run)


def triton_tile(problem: Problem, device: Device) -> TritonTile:
    """The Triton tile of a product: the table's, or what the rules say."""
    entry = find("triton", problem, device.kind)
    if entry is not None and isinstance(entry.tile, TritonTile):
        return entry.tile
    return triton_rule(problem)


def find(backend: str, problem: Problem, device_kind: str) -> Entry | None:
    """The entry of exactly this product, if there is one."""
    return _index(file_of(device_kind)).get((backend, problem))


def file_of(device_kind: str) -> Path:
    """Where the entries of a kind of device are, whether or not there are any."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


@functools.cache
def _index(path: Path) -> dict[tuple[str, Problem], Entry]:
    if not path.exists():
        return {}
    return {(entry.backend, entry.problem): entry for entry in read_entries(path)}


def read_entries(path: Path, device_kind: str | None = None) -> list[Entry]:
    """The entries of a table.

    Args:
      path: of the table.
      device_kind: whose it must be; None for anybody's.

    Raises:
      UserError: the file is not such a table; names the file and what is wrong.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        entries = [_from_json(dict(entry)) for entry in table["entries"]]
        if device_kind not in (None, table["device_kind"]):
            raise UserError(
                f"{path}: has the tiles of {table['device_kind']!r}, this device is "
                f"{device_kind!r}; choose another --table"
            )
        return entries
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a table of tiles, as `python -m pallas_kernels tune` writes it, "
            f"got {type(error).__name__}: {error}"
        ) from error


def _from_json(data: dict[str, Any]) -> Entry:
    tile = KERNELS[data.pop("kernel")](**data.pop("tile"))
    names = [field.name for field in dataclasses.fields(Problem)]
    return Entry(problem=Problem(**{name: data.pop(name) for name in names}), tile=tile, **data)


def write_entries(device_kind: str, new: list[Entry], path: Path) -> None:
    """Puts entries into a table, in place of those of the same products.

    Processes that write to one table do so one after the other; none loses what another has put in.

    Args:
      device_kind: as JAX names it.
      new: the entries.
      path: of the table; `file_of` says where the package's own are.

    Raises:
      UserError: what is there is no table of this device, or the file cannot be written; it is then
        as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(Path(os.path.realpath(path)).parent):
            old = read_entries(path, device_kind) if path.exists() else []
            write_whole(path, _to_text(device_kind, [*old, *new]))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written: {reason}; choose another --table") from error
    _index.cache_clear()


def _to_text(device_kind: str, entries: list[Entry]) -> str:
    """A table; of two entries for one product the later."""
    last = {(entry.backend, entry.problem): entry for entry in entries}
    ordered = sorted(last.values(), key=lambda e: (e.backend, dataclasses.astuple(e.problem)))
    lines = ",\n    ".join(json.dumps(entry.to_json()) for entry in ordered)
    return (
        f'{{\n  "device_kind": {json.dumps(device_kind)},\n  "entries": [\n    {lines}\n  ]\n}}\n'
    )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    The folder is locked and not the table: that is another file after each write.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some network disks lock no folders.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
