"""What the three benchmarks have in common: prompts from their files, pictures where they look."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError
from flux_jax.files import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
      name: what the scorer knows it by.
      prompt: what is drawn.
      metadata: the whole entry, where the scorer wants it back.
    """

    name: str
    prompt: str
    metadata: Mapping[str, Any] | None = None


class Layout(abc.ABC):
    """How one scorer wants its pictures.

    Attributes:
      title: of the benchmark.
      samples: pictures of a prompt, as published.
      source: the scorer that the layout was read from, repository@commit.
      square: whether pictures must be square.
    """

    title: str
    samples: int
    source: str
    square = False

    @abc.abstractmethod
    def read(self, path: Path) -> list[Item]:
        """The prompts of a published file.

        Raises:
          UserError: it cannot be read; the line is named.
        """

    @abc.abstractmethod
    def file(self, index: int, item: Item, sample: int, samples: int) -> str:
        """Where picture `sample` of prompt `index` goes, inside a model's folder."""

    @abc.abstractmethod
    def commands(self, folder: Path, prompts: Path, *, samples: int, side: int) -> list[str]:
        """What scores a model's folder, in the scorer's own checkout.

        Args:
          folder: of the model.
          prompts: what was read.
          samples: pictures of a prompt.
          side: of a picture, pixels.
        """

    def check(self, samples: int) -> None:
        """Whether the scorer can take so many pictures of a prompt.

        Raises:
          UserError: it cannot.
        """
        del samples

    def finish(self, folder: Path, item: Item, parts: Sequence[Path]) -> None:
        """What the scorer wants beside a prompt's pictures, once they are all there.

        Args:
          folder: of the model.
          item: the prompt.
          parts: its pictures.

        Raises:
          UserError: it cannot be written.
        """
        del folder, item, parts


def lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends; what is empty at the end is no line.

    Raises:
      UserError: it cannot be read, is empty, or has an empty line in the middle.
    """
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty; expected a prompt a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}, line {number}: is empty; expected a prompt")
    return lines
