"""Tensors that are read in blocks of rows: the one interface between readers and writers.

A reader knows the shape and dtype of each tensor and fills a buffer with some of its rows. Reading
from files, dequantising, renaming and concatenating are readers wrapped around readers, so that
any source reaches any target without a whole model, or even a whole tensor, in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from convert.plan import Assembly
from convert.transforms import Shape, row_count
from flux_jax.errors import UserError

# Large enough for numpy to take huge pages (from 4 MB), small enough to stay in the processor's
# cache between reading and writing: a copy in blocks of 2 MB or of 32 MB took over twice as long.
BLOCK_BYTES = 8 << 20

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOATS = (BFLOAT16, FLOAT16, FLOAT32)

# Told the name of a tensor and each of its blocks, in row order.
OnBlock = Callable[[str, np.ndarray], None]


class Spec(NamedTuple):
    """Shape and dtype of a tensor. A row is one index of its first axis; a scalar is one row."""

    shape: Shape
    dtype: np.dtype

    @property
    def rows(self) -> int:
        """Size of the first axis."""
        return row_count(self.shape)

    @property
    def row_shape(self) -> Shape:
        """Sizes of the other axes."""
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes


@runtime_checkable
class Reader(Protocol):
    """Tensors by name, read in blocks of rows."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor, in the order in which it is best read."""
        ...

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        """Fill `out` with consecutive rows of a tensor.

        Args:
          name: of the tensor.
          row: the first row, 0 for a scalar.
          out: C-contiguous `(rows, *spec.row_shape)` of the tensor's dtype.

        Raises:
          UserError: the stored bytes cannot be read.
        """
        ...


@runtime_checkable
class StoredReader(Reader, Protocol):
    """A reader of what lies in files."""

    @property
    def read_once(self) -> bool:
        """Whether what was read need not stay in the system's page cache: a hint, to be set."""
        ...

    @read_once.setter
    def read_once(self, value: bool) -> None: ...

    def close(self) -> None:
        """Close the files."""
        ...


def blocks(
    reader: Reader, name: str, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Rows of a tensor in order, in blocks of at most `BLOCK_BYTES`, but at least a row.

    Args:
      reader: where the tensor is.
      name: of the tensor.
      start, stop: first row, and the one after the last; all rows by default.

    Yields:
      `(rows, *row_shape)` arrays, each valid until the next is asked for: they share one buffer.
    """
    spec = reader.specs[name]
    stop = spec.rows if stop is None else stop
    step = min(max(1, BLOCK_BYTES // max(1, spec.row_bytes)), max(1, stop - start))
    buffer = np.empty((step, *spec.row_shape), spec.dtype)
    for row in range(start, stop, step):
        block = buffer[: min(step, stop - row)]
        reader.read_into(name, row, block)
        yield block


def read_whole(reader: Reader, name: str) -> np.ndarray:
    """A whole tensor in its own shape."""
    spec = reader.specs[name]
    out = np.empty((spec.rows, *spec.row_shape), spec.dtype)
    reader.read_into(name, 0, out)
    return out.reshape(spec.shape)


def as_bytes(block: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array; ml_dtypes arrays have no buffer of their own."""
    return block.reshape(-1).view(np.uint8).data


def total_bytes(reader: Reader) -> int:
    """Bytes of all tensors."""
    return sum(spec.nbytes for spec in reader.specs.values())


class Assembled:
    """A reader of the tensors of a plan, put together from the rows of another reader's.

    Attributes:
      specs: the plan's tensors by name.
    """

    def __init__(
        self, source: Reader, assemblies: Sequence[Assembly], dtype: np.dtype | None, *, what: str
    ):
        """A view; nothing is read yet.

        Args:
          source: reader of the pieces.
          assemblies: what to put together.
          dtype: of every tensor; None keeps the stored one (float32 where pieces differ).
          what: for messages: the component and where it comes from.

        Raises:
          UserError: a piece is not a float16, bfloat16 or float32 tensor.
        """
        self._source, self._what = source, what
        self._assemblies = {assembly.name: assembly for assembly in assemblies}
        self.specs: dict[str, Spec] = {}
        for assembly in assemblies:
            dtypes = {source.specs[piece.source].dtype for piece in assembly.pieces}
            if not dtypes <= set(FLOATS):
                bad = next(p for p in assembly.pieces if source.specs[p.source].dtype not in FLOATS)
                raise UserError(
                    f"{what}: tensor `{bad.source}` has dtype {source.specs[bad.source].dtype}, "
                    "expected bfloat16, float16, float32 or float8; a quantised checkpoint has to "
                    "be dequantised by the tool that made it"
                )
            kept = dtypes.pop() if len(dtypes) == 1 else FLOAT32
            self.specs[assembly.name] = Spec(assembly.shape, dtype or kept)

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        stop = row + out.shape[0]
        for piece in self._assemblies[name].pieces:
            source = self._source.specs[piece.source]
            for run in piece.runs:
                first, last = max(row, run.target_row), min(stop, run.target_row + run.rows)
                if first >= last:
                    continue
                part = out[first - row : last - row].reshape(last - first, *source.row_shape)
                source_row = run.source_row + first - run.target_row
                if source.dtype == out.dtype:
                    self._source.read_into(piece.source, source_row, part)
                else:
                    raw = np.empty(part.shape, source.dtype)
                    self._source.read_into(piece.source, source_row, raw)
                    cast_into(raw, part, what=f"{self._what}: tensor `{piece.source}`")


def cast_into(values: np.ndarray, out: np.ndarray, *, what: str) -> None:
    """Round `values` to `out.dtype`, to nearest, ties to even, over float32 (which is exact).

    Args:
      values: floats of at most 32 bits.
      out: of the same shape.
      what: the tensor, for the message.

    Raises:
      UserError: a value is beyond the range of float16.
    """
    with np.errstate(over="ignore"):
        out[...] = values.astype(FLOAT32, copy=False).astype(out.dtype, copy=False)
    check_range(out, what=what)


def check_range(out: np.ndarray, *, what: str) -> None:
    """Refuse infinities that rounding to float16 made.

    Raises:
      UserError: there is one.
    """
    if out.dtype == FLOAT16 and np.isinf(out).any():
        raise UserError(
            f"{what} has values beyond the range of float16 (65504); choose bfloat16 or float32"
        )
