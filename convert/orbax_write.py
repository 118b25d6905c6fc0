"""Orbax checkpoints, written in blocks of rows.

Writing goes through Orbax with a `TypeHandler` of our own: its leaves are names, TensorStore makes
each array, and the handler fills its chunks block by block. The result is an ordinary Orbax PyTree
checkpoint: one zarr array for each parameter, uncompressed (bf16 weights do not compress, and zstd
would take longer than the disk), in chunks of whole rows, so that a shard along the rows reads only
its own chunks. Any Orbax API restores it, straight onto a mesh.

Orbax is imported late: it takes half a second.
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import finish, write_all
from convert.orbax_common import nest, quiet_orbax
from convert.tensors import OnBlock, Reader, Spec, as_bytes, blocks

_CHUNK_BYTES = 32 << 20


def chunk_rows(spec: Spec, chunk_bytes: int) -> int:
    """Rows of a stored chunk: the rows divided by a power of two, if that is at most `chunk_bytes`.

    Powers of two so that the usual numbers of devices divide the chunks; a tensor whose rows do not
    divide gets a last chunk that is partly filler.
    """
    if spec.nbytes <= chunk_bytes:
        return max(1, spec.rows)
    chunks = 1
    while spec.rows % (2 * chunks) == 0 and spec.nbytes > chunks * chunk_bytes:
        chunks *= 2
    if spec.nbytes <= chunks * chunk_bytes:
        return spec.rows // chunks
    return max(1, chunk_bytes // max(1, spec.row_bytes))


def write_checkpoint(
    folder: Path,
    reader: Reader,
    on_block: OnBlock = lambda name, block: None,
) -> None:
    """Write all tensors of a reader as one Orbax checkpoint.

    Args:
      folder: to be created; must not exist.
      reader: of the tensors; dots in the names become levels of the tree.
      on_block: called with the tensor name and each block as it is handed on, in row order.

    Raises:
      UserError: reading failed.
      OSError, ValueError: writing failed. (TensorStore reports a full disk as a ValueError.)
    """
    import orbax.checkpoint as ocp

    registry = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _leaf_handler(reader, on_block))
    )
    leaves = {name: _Leaf(name, spec) for name, spec in reader.specs.items()}
    with quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        checkpointer = ocp.Checkpointer(handler)
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(nest(leaves)))
    # Orbax notes in it where the folder stood at the time, which is not where it will stand.
    note = folder / "commit_success.txt"
    if note.exists():
        note.write_text("Checkpoint commit was successful\n")


class _Leaf:
    """Stands for a tensor in the tree that Orbax saves."""

    def __init__(self, name: str, spec: Spec):
        self.name = name
        self.shape = spec.shape
        self.dtype = spec.dtype


def _leaf_handler(reader: Reader, on_block: OnBlock) -> Any:
    """The Orbax `TypeHandler` that writes `_Leaf`s."""
    import orbax.checkpoint as ocp

    class LeafHandler(ocp.type_handlers.TypeHandler):
        def typestr(self) -> str:
            return "np.ndarray"  # what a reader finds: any handler of arrays restores it

        async def serialize(
            self, values: Sequence[_Leaf], infos: Sequence[Any], args: Any = None
        ) -> Sequence[Any]:
            del args
            folders = []
            for info in infos:
                await info.await_path_creation()
                folders.append(Path(info.parent_dir / info.name))
            pairs = list(zip(values, folders, strict=True))
            created = [_create_array(f, reader.specs[leaf.name]) for leaf, f in pairs]
            for future in created:
                future.exception()  # wait for all: none may write to a folder that is removed
            for future in created:
                future.result()
            with _Finisher() as finisher:
                for leaf, folder in pairs:
                    _write_chunks(folder, reader, leaf.name, finisher, on_block)
            return []

        async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
            raise NotImplementedError("this handler only writes")

        async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
            raise NotImplementedError("this handler only writes")

    return LeafHandler()


def _create_array(folder: Path, spec: Spec) -> Any:
    """Start to create an empty zarr array; returns TensorStore's future."""
    import tensorstore as ts

    metadata = {
        "shape": list(spec.shape),
        "chunks": [chunk_rows(spec, _CHUNK_BYTES), *spec.row_shape] if spec.shape else [],
        "compressor": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
        "dtype": _zarr_dtype(spec.dtype),
    }
    store = {"driver": "file", "path": f"{folder}/"}
    array = {"driver": "zarr", "kvstore": store, "metadata": metadata, "create": True}
    return ts.open(array)


class _Finisher:
    """Finishes written files in a thread of its own, so that reading goes on meanwhile."""

    _PENDING = 2

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def finish(self, file: io.FileIO) -> None:
        """Take over a file: its bytes go to the disk, and it is closed.

        Raises:
          OSError: an earlier file could not be written.
        """
        self._pending.append(self._thread.submit(self._finish, file))
        while len(self._pending) > self._PENDING:
            self._pending.popleft().result()

    @staticmethod
    def _finish(file: io.FileIO) -> None:
        with file:
            finish(file.fileno())

    def __enter__(self) -> _Finisher:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._thread.shutdown()
        if kind is None:
            for future in self._pending:
                future.result()


def _write_chunks(
    folder: Path, reader: Reader, name: str, finisher: _Finisher, on_block: OnBlock
) -> None:
    """Write a tensor as the chunks of a zarr array.

    The chunk at row `i * rows` is the file `i.0...`: its values in C order, little-endian, without
    header (zarr 2 specification, "Storing arrays", with no compressor and no filters).
    """
    spec = reader.specs[name]
    rows = chunk_rows(spec, _CHUNK_BYTES)
    suffix = ".0" * (len(spec.shape) - 1)
    for start in range(0, spec.rows, rows):
        stop = min(start + rows, spec.rows)
        file = open(folder / f"{start // rows}{suffix}", "xb", buffering=0)  # noqa: SIM115
        try:
            for block in blocks(reader, name, start, stop):
                write_all(file.fileno(), as_bytes(block))
                on_block(name, block)
            file.truncate(rows * spec.row_bytes)  # every chunk has its full size
        except BaseException:
            file.close()
            raise
        finisher.finish(file)


def _zarr_dtype(dtype: np.dtype) -> str:
    """zarr's name of a dtype: numpy's with its byte order, but for bfloat16."""
    return "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str
