"""Writing a safetensors file whose tensors become ready in any order."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from convert.safetensors_write import make_header
from convert.tensors import Spec, as_bytes


class TensorFile:
    """One safetensors file, of tensors whose shapes are known before their values.

    Attributes:
      crc32: of each tensor that was written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec]):
        """Create the file.

        Args:
          path: must not exist.
          tensors: all that will be written.

        Raises:
          OSError: it cannot be written.
        """
        self.crc32: dict[str, int] = {}
        self._tensors = dict(tensors)
        header, self._starts = make_header(tensors, {"format": "pt"})
        size = len(header) + sum(spec.nbytes for spec in tensors.values())
        self._file = open(path, "xb", buffering=0)
        try:
            # A disk without the room says so now, where the system can ask it.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            self._write(0, header)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, values: np.ndarray) -> None:
        """Write one tensor, once.

        Raises:
          ValueError: not a tensor of this file, or of another shape or dtype.
          OSError: the disk is full.
        """
        found = Spec(values.shape, values.dtype)
        if name in self.crc32 or self._tensors.get(name) != found:
            raise ValueError(f"tensor {name!r} {found}: expected {self._tensors.get(name)}, once")
        data = as_bytes(np.ascontiguousarray(values))
        self._write(self._starts[name], data)
        self.crc32[name] = zlib.crc32(data)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                missing = sorted(self._tensors.keys() - self.crc32.keys())
                if missing:
                    raise ValueError(f"never written: {', '.join(missing[:5])}")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
