"""Where the rows of one tensor lie in another: every transform of a name map, invertible.

A transform is a placement of whole rows (indices of axis 0). So it can be read either way, and a
writer knows where each row comes from before any weight is read.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

Shape = tuple[int, ...]


class Run(NamedTuple):
    """Rows `[source_row, source_row + rows)` of a source are rows `[target_row, ...)` of a target.

    A row is one index of axis 0; a scalar counts as one row.
    """

    source_row: int
    target_row: int
    rows: int

    def swapped(self) -> Run:
        """The same rows from target to source."""
        return Run(self.target_row, self.source_row, self.rows)


def row_count(shape: Shape) -> int:
    """Rows of a tensor: its first dimension, or 1 for a scalar."""
    return shape[0] if shape else 1


class Transform:
    """Where the rows of one source tensor lie in its target. Invertible by construction."""

    def source_shape(self, target_shape: Shape) -> Shape:
        """Shape that the source must have for a target of `target_shape`.

        Raises:
          ValueError: no source can fill such a target (an odd number of rows to halve, ...).
        """
        raise NotImplementedError

    def runs(self, target_shape: Shape) -> tuple[Run, ...]:
        """The row placements; together they cover every row of the source once."""
        raise NotImplementedError

    @property
    def share(self) -> tuple[int, int]:
        """`(part, count)`: which of the target's parts this source fills. `(0, 1)`: all of it."""
        return (0, 1)


@dataclasses.dataclass(frozen=True)
class Identity(Transform):
    """Same shape, same rows."""

    def source_shape(self, target_shape: Shape) -> Shape:
        return target_shape

    def runs(self, target_shape: Shape) -> tuple[Run, ...]:
        return (Run(0, 0, row_count(target_shape)),)


IDENTITY = Identity()


@dataclasses.dataclass(frozen=True)
class Rows(Transform):
    """Part number `part` of a concatenation along the rows (axis 0).

    Either `of` equal parts (`Rows(0, of=3)`: the q of a fused qkv) or parts of the given `sizes`
    in rows (`Rows(3, sizes=(D, D, D, 4 * D))`: the MLP rows of a single block's `linear1`).
    """

    part: int
    of: int = 0
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        count = len(self.sizes) or self.of
        if bool(self.of) == bool(self.sizes):
            raise ValueError(
                f"Rows needs exactly one of `of` and `sizes`, got of={self.of}, sizes={self.sizes}"
            )
        if not 0 <= self.part < count:
            raise ValueError(f"Rows part {self.part} is outside its {count} parts")

    @property
    def share(self) -> tuple[int, int]:
        return (self.part, len(self.sizes) or self.of)

    def _span(self, target_shape: Shape) -> tuple[int, int]:
        """First row and number of rows of this part."""
        if not target_shape:
            raise ValueError("a scalar has no rows to split")
        if self.sizes:
            if sum(self.sizes) != target_shape[0]:
                raise ValueError(
                    f"parts of {self.sizes} rows do not add up to the {target_shape[0]} rows of "
                    f"shape {target_shape}"
                )
            return sum(self.sizes[: self.part]), self.sizes[self.part]
        if target_shape[0] % self.of:
            raise ValueError(f"shape {target_shape} does not split into {self.of} equal parts")
        rows = target_shape[0] // self.of
        return self.part * rows, rows

    def source_shape(self, target_shape: Shape) -> Shape:
        return (self._span(target_shape)[1], *target_shape[1:])

    def runs(self, target_shape: Shape) -> tuple[Run, ...]:
        first, rows = self._span(target_shape)
        return (Run(0, first, rows),)


@dataclasses.dataclass(frozen=True)
class SwapHalves(Transform):
    """First and second half of the rows change places (scale-shift <-> shift-scale)."""

    def source_shape(self, target_shape: Shape) -> Shape:
        if not target_shape or target_shape[0] % 2:
            raise ValueError(f"shape {target_shape} has no two halves to swap")
        return target_shape

    def runs(self, target_shape: Shape) -> tuple[Run, ...]:
        half = self.source_shape(target_shape)[0] // 2
        return (Run(0, half, half), Run(half, 0, half))


SWAP_HALVES = SwapHalves()


@dataclasses.dataclass(frozen=True)
class ConvToLinear(Transform):
    """Source is a 1x1 convolution `(O, I, 1, 1)`, target a linear weight `(O, I)`."""

    def source_shape(self, target_shape: Shape) -> Shape:
        if len(target_shape) != 2:
            raise ValueError(f"shape {target_shape} is no linear weight (O, I)")
        return (*target_shape, 1, 1)

    def runs(self, target_shape: Shape) -> tuple[Run, ...]:
        return (Run(0, 0, target_shape[0]),)


CONV_TO_LINEAR = ConvToLinear()
