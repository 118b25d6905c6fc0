"""Writing a safetensors file whose tensors become ready in any order."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from ternary.storage.format import BFLOAT16, Stored

_KINDS = {
    np.dtype(np.uint8): "U8",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    BFLOAT16: "BF16",
}


class TensorFile:
    """One safetensors file, of tensors whose shapes are known before their values.

    Attributes:
      crc32: of each tensor that was written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Stored]):
        """Create the file.

        Args:
          path: must not exist.
          tensors: all that will be written. Wider dtypes go first, so that each is aligned.

        Raises:
          OSError: it cannot be written.
        """
        self.crc32: dict[str, int] = {}
        self._tensors = dict(tensors)
        self._starts: dict[str, int] = {}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
            shape, dtype = tensors[name]
            stop = position + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": _KINDS[dtype],
                "shape": list(shape),
                "data_offsets": [position, stop],
            }
            self._starts[name], position = position, stop
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._data = 8 + len(header)
        self._file = open(path, "xb", buffering=0)
        try:
            # A disk without the room says so now, where the system can ask it.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, self._data + position)
            self._write(0, len(header).to_bytes(8, "little") + header)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, values: np.ndarray) -> None:
        """Write one tensor, once.

        Raises:
          ValueError: not a tensor of this file, or of another shape or dtype.
          OSError: the disk is full.
        """
        found = Stored(values.shape, values.dtype)
        if name in self.crc32 or self._tensors.get(name) != found:
            raise ValueError(f"tensor {name!r} {found}: expected {self._tensors.get(name)}, once")
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        self._write(self._data + self._starts[name], data)
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
