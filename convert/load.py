"""Weights of any source straight onto devices, without writing a checkpoint first."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from convert.orbax_read import OrbaxReader, restore_onto
from convert.quantized import PackedReader
from convert.source import Component, Parameters, open_source, parameters
from convert.tensors import Reader, read_whole
from flux_jax.components import Config, abstract_module
from flux_jax.configs import SchedulerConfig
from flux_jax.sharding import flat_shardings
from flux_jax.tree import split_flat, to_flat
from pallas_kernels.backends import default_device

# Host copies that may be waiting for their transfer to a device.
_HOST_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a source held.

    Attributes:
      configs: of the components asked for, by diffusers' names.
      modules: these components.
      scheduler: the noise schedule; None where the source has none.
      tokenizers: folders by name.
    """

    configs: dict[str, Config]
    modules: dict[str, nnx.Module]
    scheduler: SchedulerConfig | None
    tokenizers: dict[str, Path]


def load(
    path: Path,
    *,
    components: Sequence[str] | None = None,
    dtype: Any,
    mesh: Mesh | None = None,
) -> Loaded:
    """Load components, tensor by tensor.

    Args:
      path: anything that `convert.source.open_source` opens.
      components: which; None for all that are there.
      dtype: of the parameters.
      mesh: devices to spread over, by the rules of `flux_jax.sharding`; None for the default
        device.

    Raises:
      UserError: see `open_source` and `parameters`.
    """
    with open_source(path, components) as source:
        modules = {
            name: load_component(name, component, dtype=dtype, mesh=mesh)
            for name, component in source.components.items()
        }
        configs = {name: component.config for name, component in source.components.items()}
        return Loaded(configs, modules, source.scheduler, source.tokenizers)


@contextlib.contextmanager
def open_parameters(path: Path, name: str, dtype: Any) -> Iterator[Parameters]:
    """One component's parameters, to be read tensor by tensor for the length of the block.

    Args:
      path: as for `load`.
      name: of the component.
      dtype: of the parameters.

    Raises:
      UserError: see `open_source` and `parameters`.
    """
    with open_source(path, [name]) as source:
        yield parameters(name, source.components[name], np.dtype(dtype))


def load_component(name: str, source: Component, *, dtype: Any, mesh: Mesh | None = None) -> Any:
    """One component on its devices.

    On the host there is one tensor at a time, and those whose transfer is not done: at most 0.5 GB.

    Args:
      name: of the component.
      source: where it is.
      dtype, mesh: as for `load`.

    Raises:
      UserError: see `parameters`.
    """
    dtype = np.dtype(dtype)
    if isinstance(source.stored, PackedReader):
        return source.stored.load_module(dtype, lambda module: _shardings(module, mesh))
    ours = parameters(name, source, dtype)
    abstract = abstract_module(name, source.config, dtype)
    rebuild, flat = split_flat(abstract)
    places = _shardings(abstract, mesh)
    # Orbax's own cast makes infinities of what float16 cannot hold; ours refuses it.
    narrows = dtype == np.float16 and any(
        spec.dtype != dtype for spec in source.stored.specs.values()
    )
    if isinstance(source.stored, OrbaxReader) and not narrows:
        wanted = {
            path: jax.ShapeDtypeStruct(value.shape, dtype, sharding=places[path])
            for path, value in flat.items()
        }
        source.stored.check_chunks()
        return rebuild(restore_onto(source.stored.folder, wanted))
    return rebuild(_transfer(ours.reader, places))


def _shardings(module: nnx.Module, mesh: Mesh | None) -> Mapping[str, jax.sharding.Sharding]:
    """Where each parameter goes, by dotted path."""
    if mesh is None:
        return dict.fromkeys(to_flat(module), SingleDeviceSharding(default_device()))
    return flat_shardings(module, mesh)


def _transfer(reader: Reader, places: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    """Read every tensor and put it where it belongs, a bounded number at a time."""
    arrays: dict[str, jax.Array] = {}
    waiting: collections.deque[jax.Array] = collections.deque()
    for path in reader.specs:
        host = read_whole(reader, path)
        arrays[path] = _put(host, places[path])
        waiting.append(arrays[path])
        while sum(array.nbytes for array in waiting) > _HOST_BYTES:
            waiting.popleft().block_until_ready()
        del host  # before the next is read
    return arrays


def _put(host: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    # Each process gives its own devices their part.
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])
