"""Orbax checkpoints, written and read in blocks of rows.

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
import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.safetensors_io import finish, write_all
from convert.tensors import Reader, Spec, as_bytes, blocks
from flux_jax.errors import UserError

if TYPE_CHECKING:
    import jax

_CHUNK_BYTES = 32 << 20
_RESTORE_BATCH_BYTES = 256 << 20
_RESTORE_GB = 2  # on the host at a time, on their way to the devices


# Told the name of a tensor and each of its blocks, in row order.
OnBlock = Callable[[str, np.ndarray], None]


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
    with _quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        checkpointer = ocp.Checkpointer(handler)
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(nest(leaves)))
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
            for created in [_create_array(f, reader.specs[leaf.name]) for leaf, f in pairs]:
                created.result()
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


class OrbaxReader:
    """Reader of the arrays of an Orbax checkpoint, by dotted path.

    Whatever wrote it (this module, or a training loop): arrays are restored by Orbax, a batch of
    at most 256 MB of neighbours at a time.

    Attributes:
      folder: of the checkpoint.
      specs: shapes and dtypes by dotted path.
    """

    def __init__(self, folder: Path):
        """Reads the metadata.

        Raises:
          UserError: the folder holds no Orbax checkpoint of arrays.
        """
        import orbax.checkpoint as ocp

        self.folder = folder.absolute()
        self.read_once = False  # no effect: Orbax reads
        self._batch: dict[str, np.ndarray] = {}
        try:
            with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(self.folder)
            tree = getattr(tree, "item_metadata", tree)
            leaves = flatten(getattr(tree, "tree", tree))
            self.specs = {
                name: Spec(tuple(leaf.shape), np.dtype(leaf.dtype))
                for name, leaf in sorted(leaves.items())
            }
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"{folder}: no readable Orbax checkpoint: {reason[0] if reason else repr(error)}"
            ) from error

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        if name not in self._batch:
            self._batch = self._restore(self._neighbours(name))
        array = self._batch[name].reshape(self.specs[name].rows, *self.specs[name].row_shape)
        out[...] = array[row : row + out.shape[0]]

    def _neighbours(self, name: str) -> list[str]:
        names = list(self.specs)
        chosen, size = [], 0
        for other in names[names.index(name) :]:
            size += self.specs[other].nbytes
            if chosen and size > _RESTORE_BATCH_BYTES:
                break
            chosen.append(other)
        return chosen

    def _restore(self, names: list[str]) -> dict[str, np.ndarray]:
        import jax
        import orbax.checkpoint as ocp

        specs = {name: self.specs[name] for name in names}
        item = nest({n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()})
        as_numpy = nest({n: ocp.RestoreArgs(restore_type=np.ndarray) for n in names})
        restore = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
        try:
            with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
                return flatten(checkpointer.restore(self.folder, args=restore))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: damaged checkpoint: {first_line(error)}") from error

    def close(self) -> None:
        self._batch = {}


def restore_onto(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restore a checkpoint straight onto devices.

    Args:
      folder: of the Orbax checkpoint.
      wanted: shape, dtype (cast to, if stored otherwise) and sharding by dotted path.

    Raises:
      UserError: an array is missing or damaged.
    """
    import orbax.checkpoint as ocp

    tree = nest(dict(wanted))
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_RESTORE_GB)
    try:
        with _quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            args = ocp.args.PyTreeRestore(tree, restore_args=restore_args)
            return flatten(checkpointer.restore(folder.absolute(), args=args))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged checkpoint: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` to `{"a": {"b": x}}`: the tree of an Orbax checkpoint."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        level = tree
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`; lists and tuples count as levels named by index."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """No warnings about options (OCDBT, sharding files) that are off on purpose."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
