"""The one place where `ternary` reaches for `convert`, which knows every layout on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.errors import UserError
from ternary.storage.format import Shape, Stored

# So many rows of a matrix name it.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An opened checkpoint, of any layout, as something to be quantised.

    Attributes:
      config: of the transformer.
      shapes: of its parameters, by our names.
      read: a parameter by name, as it is stored (float8 becomes bfloat16).
      write_rest: writes everything but the transformer's weights to a folder, in diffusers' layout.
      scheduler: the noise schedule; None where the source has none.
      ternary: whether the transformer is packed already, and what is read stands for it.
    """

    config: FluxConfig
    shapes: dict[str, Shape]
    read: Callable[[str], np.ndarray]
    write_rest: Callable[[Path], None]
    scheduler: SchedulerConfig | None = None
    ternary: bool = False


@contextlib.contextmanager
def open_pipeline(path_or_repo_id: str | Path) -> Iterator[Pipeline]:
    """Open a checkpoint for the length of the block.

    Raises:
      UserError: it cannot be read, or has no transformer.
    """
    from convert import hub, source, targets
    from convert.tensors import read_whole

    path = hub.resolve(path_or_repo_id)
    with source.open_source(path, read_once=True) as opened:
        if "transformer" not in opened.components:
            raise UserError(
                f"{path}: has no transformer; it has {', '.join(opened.components) or 'nothing'}"
            )
        parts = {
            name: source.parameters(name, component, None)
            for name, component in opened.components.items()
        }
        transformer = parts.pop("transformer")
        config: Any = transformer.config

        def write_rest(folder: Path) -> None:
            targets.write_diffusers(folder, opened, parts, 2**62, lambda *block: None)
            index = folder / "model_index.json"
            content = json.loads(index.read_text())
            content["transformer"] = ["diffusers", "FluxTransformer2DModel"]
            index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

        yield Pipeline(
            config=config,
            shapes={name: spec.shape for name, spec in transformer.reader.specs.items()},
            read=lambda name: read_whole(transformer.reader, name),
            write_rest=write_rest,
            scheduler=opened.scheduler,
            ternary=opened.components["transformer"].quantized,
        )


@contextlib.contextmanager
def open_dense_pipeline(path_or_repo_id: str | Path) -> Iterator[Pipeline]:
    """As `open_pipeline`, of what can be quantised.

    Raises:
      UserError: as there, or the transformer is ternary already.
    """
    with open_pipeline(path_or_repo_id) as pipeline:
        if pipeline.ternary:
            raise UserError(
                f"{path_or_repo_id} is ternary already; give the dense model it was made from"
            )
        yield pipeline


def weights_crc32(path_or_repo_id: str | Path, dtype: np.dtype) -> int:
    """A short name for the weights of a checkpoint's components, in any layout.

    It is made of all shapes, all vectors, and rows of every matrix from its first to its last.

    Args:
      path_or_repo_id: of the checkpoint.
      dtype: to which all are rounded first.

    Returns:
      A CRC-32.

    Raises:
      UserError: it cannot be read.
    """
    from convert import hub, source
    from convert.tensors import as_bytes, read_whole

    crc = 0
    with source.open_source(hub.resolve(path_or_repo_id)) as opened:
        for component in sorted(opened.components):
            part = opened.components[component]
            reader = source.parameters(component, part, dtype).reader
            for name, spec in sorted(reader.specs.items()):
                crc = zlib.crc32(f"{component} {name} {spec.shape}".encode(), crc)
                if len(spec.shape) < 2:
                    crc = zlib.crc32(as_bytes(read_whole(reader, name)), crc)
                    continue
                row = np.empty((1, *spec.row_shape), spec.dtype)
                # Of joined matrices, some of each.
                for index in np.linspace(0, spec.rows - 1, _ROWS).astype(int):
                    reader.read_into(name, int(index), row)
                    crc = zlib.crc32(as_bytes(row), crc)
    return crc


def local_path(path: str | Path) -> Path:
    """A path as it was given, `~` resolved; it need not exist.

    Raises:
      UserError: no user of that name, or a name that no file can have.
    """
    from convert import hub

    return hub.local_path(path)


@contextlib.contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder that becomes `target` at the end of the block, complete or not at all.

    Raises:
      UserError: the target exists, or cannot be written to.
    """
    from convert import atomic, engine

    with atomic.staged(target, force=force, replaceable=engine.is_checkpoint) as stage:
        stage.mkdir()
        yield stage


def check_target(target: Path, *, force: bool) -> None:
    """As `staged` checks, before long work."""
    from convert import atomic, engine

    atomic.check_target(target, force=force, replaceable=engine.is_checkpoint)


def config_to_json(config: FluxConfig) -> dict[str, Any]:
    """A transformer's `config.json`, under diffusers' names."""
    from convert import tables

    return tables.config_to_hf("transformer", config)


def config_from_json(raw: Mapping[str, Any]) -> FluxConfig:
    """The inverse of `config_to_json`.

    Raises:
      UserError: another architecture, or fields that are missing or of another type.
    """
    from convert import tables

    config: Any = tables.config_from_hf("transformer", raw)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: absent, or no JSON object.
    """
    from convert.files import read_json

    return read_json(path)


class StoredTensors:
    """The tensors of a safetensors file, its header checked.

    Attributes:
      specs: by name.
    """

    def __init__(self, path: Path):
        """Open a file.

        Raises:
          UserError: no such file, or it is truncated or forged; the message names the tensor.
        """
        from convert.safetensors_read import SafetensorsReader

        self._reader = SafetensorsReader.open_file(path)
        specs = self._reader.specs
        self.specs = {name: Stored(spec.shape, spec.dtype) for name, spec in specs.items()}

    def read(self, name: str) -> np.ndarray:
        """A whole tensor.

        Raises:
          UserError: it cannot be read.
        """
        from convert.tensors import read_whole

        return read_whole(self._reader, name)

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Rows of a tensor, from `start` on, into an array of its dtype.

        Raises:
          UserError: they cannot be read.
        """
        self._reader.read_into(name, start, out)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def reader_specs(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Shapes and dtypes as `convert` wants them from a reader."""
    from convert.tensors import Spec

    return {name: Spec(shape, dtype) for name, (shape, dtype) in tensors.items()}
