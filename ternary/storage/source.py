"""A checkpoint of any layout as something to be quantised."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert import hub, source, targets
from convert.tensors import as_bytes, read_whole
from convert.transforms import Shape
from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.errors import UserError

# So many rows of a matrix name it.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An opened checkpoint, of any layout, as something to be quantised.

    Attributes:
      path: the local folder or file.
      config: of the transformer.
      shapes: of its parameters, by our names.
      read: a parameter by name, as it is stored (float8 becomes bfloat16).
      write_rest: writes everything but the transformer's weights to a folder, in diffusers' layout.
      scheduler: the noise schedule; None where the source has none.
      ternary: whether the transformer is packed already, and what is read stands for it.
    """

    path: Path
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
            path=path,
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
