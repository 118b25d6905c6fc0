"""The conversion: open a source, check it, write a target beside its place, verify, rename."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert import atomic, hub
from convert.files import finish
from convert.replaceable import check_apart, check_target, is_checkpoint
from convert.safetensors_header import SUFFIX
from convert.source import Parameters, Source, open_source, parameters
from convert.targets import OnComponentBlock, write_bfl, write_diffusers, write_flax
from convert.tensors import BFLOAT16, FLOAT16, FLOAT32, as_bytes, blocks, total_bytes
from flux_jax.errors import UserError

DTYPES: dict[str, np.dtype | None] = {
    "bf16": BFLOAT16,
    "fp16": FLOAT16,
    "fp32": FLOAT32,
    "keep": None,
}
TARGETS = ("flax", "diffusers", "bfl")
DEFAULT_SHARD_BYTES = 9_900_000_000


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion wrote.

    Attributes:
      path: of the target.
      components: by name.
      nbytes: of the parameters written.
      dropped: `(component, stored tensor, reason)` of each tensor left out.
      verified: tensors re-read and compared; 0 without `verify`.
      unpacked: those of the components that were packed codes, and are dense weights now.
    """

    path: Path
    components: tuple[str, ...]
    nbytes: int
    dropped: tuple[tuple[str, str, str], ...]
    verified: int
    unpacked: tuple[str, ...]


class _Checksums:
    """CRC-32 of each tensor's bytes, row by row as they pass."""

    def __init__(self):
        self.of: dict[tuple[str, str], int] = {}

    def add(self, component: str, name: str, block: np.ndarray) -> None:
        key = (component, name)
        self.of[key] = zlib.crc32(as_bytes(block), self.of.get(key, 0))


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    components: Sequence[str] | None = None,
    revision: str | None = None,
    dtype: str = "bf16",
    to: str = "flax",
    verify: bool = False,
    force: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_start: Callable[[int], None] = lambda nbytes: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Summary:
    """Convert a checkpoint.

    Args:
      src: a folder or file of any layout that can be read, a hub id, or a shipped model's name.
      dst: to be made: a folder, or a `.safetensors` file for one component with `to="bfl"`.
      components: which; None for all that are there.
      revision: branch, tag or commit of a hub id.
      dtype: "bf16", "fp16" or "fp32"; "keep" leaves each tensor's own (float8 becomes bf16).
      to: "flax", "diffusers" or "bfl".
      verify: read the target again before it is put in place and compare checksums.
      force: replace an existing checkpoint.
      shard_bytes: largest safetensors file of a diffusers folder.
      on_start: told the bytes to be written (with `verify`, and to be read again).
      on_bytes: told the bytes of each block that was handled.

    Returns:
      What was written.

    Raises:
      UserError: anything wrong with the source or the target; nothing is left behind then.
    """
    for value, known, option in ((dtype, DTYPES, "dtype"), (to, TARGETS, "to")):
        if value not in known:
            raise UserError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    dst = hub.local_path(dst)
    if dst.suffix == SUFFIX and to != "bfl":
        raise UserError(
            f"{dst}: names a single file, but {to!r} is a folder; choose to='bfl' (--to bfl), or "
            "another name"
        )
    # Before a download of tens of gigabytes.
    check_target(dst, force=force)
    src = hub.resolve(src, components, revision=revision)
    check_apart(src, dst)
    with open_source(src, components, read_once=True) as source:
        if not source.components:
            raise UserError(f"{src}: none of the wanted components in it")
        if source.kind == to == "flax" and dtype == "keep":
            raise UserError(f"{src}: is a Flax checkpoint already; use --to or --dtype, or copy it")
        parts = {
            name: parameters(name, component, DTYPES[dtype])
            for name, component in source.components.items()
        }
        unpacked = tuple(name for name, part in source.components.items() if part.quantized)
        nbytes = sum(total_bytes(part.reader) for part in parts.values())
        _check_space(dst, nbytes)
        on_start(nbytes * (2 if verify else 1))
        checksums = _Checksums()

        def handed_on(component: str, name: str, block: np.ndarray) -> None:
            if verify:
                checksums.add(component, name, block)
            on_bytes(block.nbytes)

        with atomic.staged(dst, force=force, replaceable=is_checkpoint) as stage:
            with full_disk_explained(dst):
                _write(stage, source, parts, to, shard_bytes, handed_on)
            verified = _verify(stage, checksums, list(parts), on_bytes) if verify else 0
    dropped = tuple((name, *entry) for name, part in parts.items() for entry in part.dropped)
    return Summary(dst, tuple(parts), nbytes, dropped, verified, unpacked)


def _write(
    stage: Path,
    source: Source,
    parts: Mapping[str, Parameters],
    to: str,
    shard_bytes: int,
    on_block: OnComponentBlock,
) -> None:
    if to == "bfl":
        write_bfl(stage, parts, on_block)
        return
    stage.mkdir()
    if to == "diffusers":
        write_diffusers(stage, source, parts, shard_bytes, on_block)
    else:
        write_flax(stage, source, parts, on_block)


def _check_space(dst: Path, nbytes: int) -> None:
    parent = dst.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise UserError(
            f"{dst}: the checkpoint needs {nbytes / 1e6:,.0f} MB, the disk has "
            f"{free / 1e6:,.0f} MB free"
        )


_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


@contextlib.contextmanager
def full_disk_explained(dst: Path) -> Iterator[None]:
    """TensorStore's report of a full disk as a line for users.

    It is a ValueError or a RuntimeError with the system's text in it.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = next((full for full in _FULL_TEXTS if full in str(error)), None)
        if reason is None:
            raise
        raise UserError(f"{dst}: disk full while writing ({reason}); nothing was kept") from error


def _verify(
    stage: Path,
    written: _Checksums,
    components: Sequence[str],
    on_bytes: Callable[[int], None],
) -> int:
    """Read the target as any source is read, from the disk, and compare checksums.

    Raises:
      UserError: a tensor differs, or is missing.
    """
    _forget_cached(stage)
    again = _Checksums()
    with open_source(stage, components) as target:
        for name, component in target.components.items():
            parameters(name, component, None)  # complete, and of the right shapes
            for tensor in component.stored.specs:
                for block in blocks(component.stored, tensor):
                    again.add(name, tensor, block)
                    on_bytes(block.nbytes)
    keys = written.of.keys() | again.of.keys()
    wrong = sorted(key for key in keys if written.of.get(key) != again.of.get(key))
    if wrong:
        shown = ", ".join(f"`{tensor}` of {name}" for name, tensor in wrong[:5])
        raise UserError(
            f"{len(wrong)} of {len(keys)} tensors differ when read again: {shown}; the disk or the "
            "memory is faulty, nothing was kept"
        )
    return len(keys)


def _forget_cached(path: Path) -> None:
    """Ask the system to drop the pages of written files, so that the disk is read, not memory."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                finish(descriptor)
            finally:
                os.close(descriptor)
