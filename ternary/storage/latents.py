"""Latent weights on disk: where `calibrate` ends and `distill` begins.

    latents/latents.json                    format, version, QuantConfig, Policy, checksums
    latents/double_blocks.0.safetensors     the parameters of one part of the student
    ...

Names are the dotted paths of a transformer whose chosen linears are `FakeTernaryLinear`. The parts
are files of their own, so that a run that makes them one by one never holds, or writes, two.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import read_json
from convert.safetensors_read import SafetensorsReader
from convert.tables import LATENTS
from convert.tensors import Spec, as_bytes, read_whole
from flux_jax.errors import UserError
from ternary.config import QuantConfig
from ternary.policy import Policy
from ternary.storage.tensor_file import TensorFile

FORMAT = "flux_ternary_latents"
VERSION = 1
INDEX = "latents.json"

# CRC-32 of each tensor of a part, by name.
Checksums = dict[str, int]


class Latents(Mapping[str, np.ndarray]):
    """Latent weights by name, each read and checked when it is asked for; nothing is kept.

    A context manager: the files are closed at the end of its block.
    """

    def __init__(self, folder: Path, checksums: Mapping[str, Checksums]):
        """Open the files of a folder.

        Args:
          folder: with a safetensors file for each part.
          checksums: of each part's tensors.

        Raises:
          UserError: a file that is missing or damaged, or has other tensors than it should.
        """
        self._readers: dict[str, SafetensorsReader] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._what = folder
        for part, expected in checksums.items():
            if Path(part).name != part:
                raise UserError(f"{folder / INDEX}: {ascii(part)[:60]} is no file of this folder")
            path = folder / f"{part}.safetensors"
            reader = self._readers[part] = SafetensorsReader.open_file(path)
            wrong = sorted(reader.specs.keys() ^ expected.keys())
            if wrong:
                state = "is missing" if wrong[0] in expected else "is not expected"
                raise UserError(f"{path}: tensor `{wrong[0]}` {state}; make the latents again")
            self._places |= {name: (part, crc) for name, crc in expected.items()}

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a tensor, from the header."""
        return self._readers[self._places[name][0]].specs[name]

    def __getitem__(self, name: str) -> np.ndarray:
        part, crc = self._places[name]
        values = read_whole(self._readers[part], name)
        found = zlib.crc32(as_bytes(values))
        if found != crc:
            raise UserError(
                f"{self._what}: tensor `{name}` of {part} is damaged: its checksum is "
                f"{found:08x}, expected {crc:08x}; copy it or make it again"
            )
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> Latents:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()


def write_part(path: Path, tensors: Mapping[str, Any]) -> Checksums:
    """One part's file, by full names of its parameters; returns their checksums.

    Raises:
      OSError: it cannot be written.
    """
    stored = {n: Spec(tuple(v.shape), np.dtype(v.dtype)) for n, v in tensors.items()}
    with TensorFile(path, stored) as file:
        for name, values in tensors.items():
            file.write(name, np.asarray(values))
    return dict(file.crc32)


def write_index(
    folder: Path, checksums: Mapping[str, Checksums], quant: QuantConfig, policy: Policy
) -> None:
    """`latents.json`, after the files of all parts.

    Raises:
      OSError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "format_version": VERSION,
        "quant": dataclasses.asdict(quant),
        "policy": dataclasses.asdict(policy),
        "crc32": {
            part: {name: f"{crc:08x}" for name, crc in found.items()}
            for part, found in checksums.items()
        },
    }
    (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")


def load_latents(folder: Path) -> tuple[Latents, QuantConfig, Policy]:
    """Open the latent weights that `python -m ternary calibrate` wrote.

    Args:
      folder: the one with `latents.json`, or the checkpoint that has it under `latents/`.

    Returns:
      (parameters, quant, policy); the parameters are read when they are asked for, from files that
      the caller closes.

    Raises:
      UserError: no such folder, another format or version, or a file that is damaged; a damaged
        tensor when it is asked for.
    """
    inner = folder / LATENTS
    folder = inner if inner.is_dir() else folder
    path = folder / INDEX
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {INDEX}; expected the latents of `python -m ternary calibrate`"
        )
    raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise UserError(f"{path}: format {ascii(raw.get('format'))[:40]}, expected {FORMAT!r}")
    if raw.get("format_version") != VERSION:
        raise UserError(
            f"{path}: latents version {ascii(raw.get('format_version'))[:20]}, this program reads "
            f"{VERSION}; update it, or calibrate again"
        )
    try:
        quant = QuantConfig(**raw["quant"])
        policy = Policy(**{name: tuple(patterns) for name, patterns in raw["policy"].items()})
        checksums = {
            str(part): {str(name): int(crc, 16) for name, crc in found.items()}
            for part, found in raw["crc32"].items()
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: quant, policy or crc32 is missing or malformed") from error
    return Latents(folder, checksums), quant, policy
