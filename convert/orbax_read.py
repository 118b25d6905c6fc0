"""Orbax checkpoints, read in blocks of rows or restored straight onto devices.

Blocks are read with TensorStore, as Orbax does it; whole models are restored by Orbax itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.files import read_json
from convert.orbax_common import flatten, nest, quiet_orbax
from convert.problems import first_line
from convert.tensors import Spec
from flux_jax.errors import UserError

if TYPE_CHECKING:
    import jax

_CACHE_BYTES = 256 << 20  # decoded chunks: a block is less than a chunk
_RESTORE_GB = 2  # on the host at a time, on their way to the devices


def array_names(folder: Path) -> list[str]:
    """Dotted paths of an Orbax checkpoint's arrays, as its metadata lists them.

    Raises:
      UserError: it cannot be read.
    """
    metadata = folder / "_METADATA"
    try:
        return [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in read_json(metadata)["tree_metadata"].values()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{metadata}: not the metadata of an Orbax checkpoint") from error


class OrbaxReader:
    """Reader of the arrays of an Orbax checkpoint, by dotted path.

    Reads what Orbax writes: OCDBT or a folder for each array, zarr 2 or 3.

    Attributes:
      folder: of the checkpoint.
      specs: shapes and dtypes by dotted path.
    """

    def __init__(self, folder: Path):
        """Opens the arrays.

        Raises:
          UserError: the folder holds no Orbax checkpoint of arrays, or lacks one of them.
        """
        self.folder = folder.resolve()
        self.read_once = False  # without effect
        self._ocdbt = (folder / "manifest.ocdbt").exists()
        metadata = folder / "_METADATA"
        if not metadata.is_file():
            raise UserError(f"{folder}: no Orbax checkpoint (no _METADATA in it)")
        zarr3 = bool(read_json(metadata).get("use_zarr3"))
        self._stores = self._open(sorted(array_names(folder)), zarr3=zarr3)
        self.specs = {
            name: Spec(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))
            for name, store in self._stores.items()
        }

    def _open(self, names: list[str], *, zarr3: bool) -> dict[str, Any]:
        import tensorstore as ts

        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        files = {"driver": "file", "path": f"{self.folder}/"}
        opening = {}
        for name in names:
            if self._ocdbt:
                kvstore = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
            else:
                kvstore = {"driver": "file", "path": f"{self.folder}/{name}/"}
            spec = {
                "driver": "zarr3" if zarr3 else "zarr",
                "kvstore": kvstore,
                "recheck_cached_data": False,
                "fill_missing_data_reads": False,
            }
            opening[name] = ts.open(spec, open=True, read=True, context=context)
        stores = {}
        for name, future in opening.items():
            try:
                stores[name] = future.result()
            except (ValueError, RuntimeError) as error:
                raise self._damaged(name, _reason(error)) from error
        return stores

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(f"{self.folder}: damaged checkpoint: array `{name}`: {reason}")

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        store = self._stores[name]
        part = store[row : row + out.shape[0]] if self.specs[name].shape else store
        try:
            out[...] = part.read().result()
        except (ValueError, RuntimeError) as error:
            raise self._damaged(name, _reason(error)) from error

    def check_chunks(self) -> None:
        """Look for the file of every chunk, and at its size where it is not compressed.

        Orbax reads many arrays at once and, when one fails, leaves the others to complain on their
        own. So what can be missing is looked for first. (OCDBT keeps chunks in a database.)

        Raises:
          UserError: a chunk is missing or cut off.
        """
        if self._ocdbt:
            return
        for name, store in self._stores.items():
            metadata = store.spec().to_json().get("metadata", {})
            if "chunks" not in metadata:  # zarr 3
                continue
            separator = metadata.get("dimension_separator", ".")
            # A chunk at the end is as large as the others.
            packed = metadata.get("compressor") or metadata.get("filters")
            itemsize = self.specs[name].dtype.itemsize
            nbytes = None if packed else math.prod(metadata["chunks"]) * itemsize
            grid = [
                range(-(-size // chunk))
                for size, chunk in zip(store.shape, metadata["chunks"], strict=True)
            ]
            for index in itertools.product(*grid):
                file = separator.join(map(str, index)) or "0"
                if not (self.folder / name / file).is_file():
                    raise self._damaged(name, f"chunk {file} is missing")
                size = (self.folder / name / file).stat().st_size
                if nbytes is not None and size != nbytes:
                    raise self._damaged(
                        name, f"chunk {file} has {size} bytes, expected {nbytes}: it was cut off"
                    )

    def close(self) -> None:
        """Let go of the arrays."""
        self._stores = {}


def _reason(error: BaseException) -> str:
    """TensorStore's words, without the specification of the array that it puts behind them."""
    return first_line(error).partition(" [tensorstore_spec=")[0]


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
        with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            args = ocp.args.PyTreeRestore(tree, restore_args=restore_args)
            return flatten(checkpointer.restore(folder.resolve(), args=args))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged checkpoint: {first_line(error)}") from error
