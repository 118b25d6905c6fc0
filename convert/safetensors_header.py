"""The header of a safetensors file, read with suspicion.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length N, N bytes of
JSON that map tensor names to dtype, shape and byte range, then the data. The checks are ours, so
that a message can name the file and the tensor, and so that nothing is allocated on the word of a
forged header: the header has to be in the file before it is read.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.transforms import Shape
from flux_jax.errors import UserError

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"

# Far above any real model: FLUX.1-dev has 90 kB for 780 tensors. The reference reader stops at
# 100 MB.
MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 8
MAX_NAME = 512

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class StoredTensor(NamedTuple):
    """One tensor of a file.

    Attributes:
      path: the file.
      dtype, shape: as stored, C order.
      start: first byte in the file.
    """

    path: Path
    dtype: np.dtype
    shape: Shape
    start: int


class Header(NamedTuple):
    """What a safetensors header says.

    Attributes:
      tensors: in the order of their bytes.
      metadata: the `__metadata__` strings.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


class _DuplicateKey(Exception):
    pass


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return out


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
      UserError: the file is no safetensors file, or is truncated or forged; the message names the
        file, and the tensor where one is at fault.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise UserError(f"{path}: {size} bytes are too few for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise UserError(
                    f"{path}: not a safetensors file: its header would be {length} bytes long, at "
                    f"most {MAX_HEADER_BYTES} are allowed"
                )
            if length > size - 8:
                raise UserError(
                    f"{path}: truncated: the header needs {length} bytes, the file has {size - 8} "
                    "after the length; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_header(text, size - 8 - length, path)


def parse_header(text: bytes, data_bytes: int, path: Path) -> Header:
    """Check the JSON of a header against the number of data bytes that follow it.

    Raises:
      UserError: see `read_header`.
    """
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except _DuplicateKey as error:
        raise UserError(
            f"{path}: forged header: key {ascii(str(error)[:60])} appears twice"
        ) from error
    except (ValueError, RecursionError) as error:
        # Undecodable UTF-8, malformed JSON and oversized numbers are all ValueErrors.
        raise UserError(f"{path}: not a safetensors file: its header is no valid JSON") from error
    if not isinstance(fields, dict) or not text.startswith(b"{"):
        raise UserError(f"{path}: not a safetensors file: its header is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: forged header: `__metadata__` must map strings to strings")

    base = 8 + len(text)
    found = []
    for name, entry in fields.items():
        dtype, shape, start, stop = _check_entry(path, name, entry, data_bytes)
        found.append((start, stop, name, StoredTensor(path, dtype, shape, base + start)))
    found.sort(key=lambda item: item[:2])
    position = 0
    for start, stop, name, _ in found:
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise UserError(
                f"{path}: forged header: tensor `{name}` at bytes {start}..{stop} {what}, "
                f"expected to start at {position}"
            )
        position = stop
    if position != data_bytes:
        raise UserError(
            f"{path}: the tensors end at byte {position}, the data at {data_bytes}; "
            "download it again"
        )
    return Header({name: tensor for *_, name, tensor in found}, metadata)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(
    path: Path, name: str, entry: Any, data_bytes: int
) -> tuple[np.dtype, Shape, int, int]:
    """Dtype, shape and byte range of one tensor."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise UserError(
            f"{path}: forged header: a tensor name must be at most {MAX_NAME} printable "
            f"characters, got {ascii(name[:60])}"
        )
    where = f"{path}: forged header: tensor `{name}`"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} must have exactly the keys dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(
            f"{where} has dtype {ascii(kind)[:40]}, which is not read here; known: "
            f"{', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise UserError(
            f"{where} has no valid shape, expected at most {MAX_DIMENSIONS} sizes >= 0, "
            f"got {ascii(shape)[:60]}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise UserError(f"{where} has no valid data_offsets, got {ascii(offsets)[:60]}")
    start, stop = offsets
    if start > stop:
        raise UserError(f"{where} ends at byte {stop} before it starts at {start}")
    if stop > data_bytes:
        raise UserError(
            f"{path}: truncated: tensor `{name}` ends at byte {stop} of the data, the file has "
            f"{data_bytes}; download it again"
        )
    dtype = DTYPES[kind]
    needed = math.prod(shape) * dtype.itemsize
    if needed != stop - start:
        raise UserError(
            f"{where} of shape {ascii(shape)[:60]} and dtype {kind} needs {needed} bytes, "
            f"its range {start}..{stop} has {stop - start}"
        )
    return dtype, tuple(shape), start, stop
