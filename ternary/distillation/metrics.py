"""What a run reports: a row of CSV for every step, TensorBoard, and whether all is finite."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


class Table:
    """A CSV file that grows by rows with a `step`, and can be cut back to a step.

    Args:
      path: the file; rows that it has are kept, but for those beyond `step`.
      columns: names, `step` first.
      step: the last step whose row counts.

    Attributes:
      last: the last row that was kept, its cells by column; None without any.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        rows = [row for row in _read(path, columns) if int(row[0]) <= step]
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        unfinished.replace(path)
        self.last = dict(zip(columns, rows[-1], strict=True)) if rows else None
        self._columns = tuple(columns)
        self._path = path
        self._file = path.open("a", newline="")
        self._rows = csv.writer(self._file)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; floats with all the digits that tell them apart."""
        for row in rows:
            self._rows.writerow([_cell(row[name]) for name in self._columns])
        self._file.flush()

    def read(self) -> list[dict[str, str]]:
        """All rows, their cells by column."""
        return [dict(zip(self._columns, r, strict=True)) for r in _read(self._path, self._columns)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cell(value: Any) -> Any:
    return repr(float(value)) if isinstance(value, float) else value


def _read(path: Path, columns: Sequence[str]) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    # A row that was cut off by a kill is no row.
    return [row for row in rows[1:] if len(row) == len(columns) and row[0].isdecimal()]


class Board:
    """TensorBoard's event file.

    Args:
      folder: where it goes; made if absent.
      step: events beyond it, of an earlier process, are hidden.

    Raises:
      OSError: it cannot be written to; of every method.
    """

    def __init__(self, folder: Path, step: int):
        # Late: protocol buffers take a while to import.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._summary = summary
        self._messages: Any = event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # No `SummaryWriter`: what waits for its thread is lost when the process is killed, and for
        # a thread that a full disk has ended it waits for ever.
        self._writer = EventsWriter(str(folder / "events"))
        log = self._messages.SessionLog
        self._add(step + 1, session_log=log(status=log.START))
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, by the names of their curves."""
        for name, value in values.items():
            self._add(step, summary=self._summary.scalar(name, value))
        self._writer.flush()

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture of a step."""
        import numpy as np

        drawn = self._summary.image(name, np.asarray(picture), dataformats="HWC")
        self._add(step, summary=drawn)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        event = self._messages.Event(step=step, wall_time=time.time(), **what)
        self._writer.write_event(event)


def first_not_finite(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> tuple[int, str] | None:
    """(step, column) of the first value that is NaN or infinite, if there is one."""
    for row in rows:
        for column in columns:
            if not math.isfinite(row[column]):
                return int(row["step"]), column
    return None
