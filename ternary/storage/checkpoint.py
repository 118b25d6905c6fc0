"""Ternary checkpoints, read without the dense weights; `ternary.storage.saving` writes them.

The format is that of `ternary.storage.format`. A tensor is read, checked, brought from five digits
a byte to two bits a code, and handed to its device; a few at a time.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Shaped, UInt8

from convert import tables
from convert.files import read_json
from convert.maps.transformer import config_from_hf
from convert.problems import naming
from convert.safetensors_read import SafetensorsReader
from convert.tensors import BFLOAT16, Spec, as_bytes, read_whole
from convert.transforms import Shape
from flux_jax.components import abstract_module
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.linears import replace_linears
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat
from pallas_kernels import GROUP
from pallas_kernels.backends import default_device
from ternary.config import QuantConfig
from ternary.layers import TernaryLinear
from ternary.storage.base3 import base3_to_packed, unpack_base3
from ternary.storage.device_base3 import base3_to_packed_on
from ternary.storage.format import (
    CODES,
    WEIGHT,
    check_tensors,
    expected_tensors,
    layers_in,
    read_description,
)

# Tensors read, checked and unpacked at the same time.
_LOADERS = 4


class TernaryCheckpoint:
    """The transformer of a ternary checkpoint, opened: its headers are read and checked.

    Also a reader of the dense parameters, decoded on request, for `convert`.

    Attributes:
      config: hyper-parameters of the model.
      description: how it is quantised.
      layers: paths of the ternary linears.
      stored: every tensor on disk.
      shapes: of the dense model's parameters.
      specs: of the dense parameters, as `convert` wants them.
    """

    def __init__(self, folder: Path):
        """Open a folder with `config.json` and `ternary.safetensors`.

        Raises:
          UserError: another format or version, or a file that is damaged; the message names the
            tensor.
        """
        file = folder / "config.json"
        raw = read_json(file)
        self._what = str(folder / tables.TERNARY_FILE)
        self.description = read_description(raw.get(tables.QUANTIZATION), str(file))
        with naming(file):
            self.config = config_from_hf(raw)
        self.shapes = dense_shapes(self.config)
        self._reader = SafetensorsReader.open_file(folder / tables.TERNARY_FILE)
        try:
            self.stored = self._reader.specs
            self.layers = layers_in(self.stored)
            with naming(self._what):
                expected = expected_tensors(self.shapes, self.layers, self.description.quant)
            check_tensors(self.stored, expected, self._what)
            without = [name for name in expected if name not in self.description.crc32]
            if without:
                raise UserError(f"{self._what}: tensor `{without[0]}` has no checksum")
        except UserError:
            self.close()
            raise
        self.specs = {name: Spec(shape, BFLOAT16) for name, shape in self.shapes.items()}
        self.read_once = False  # of `convert`'s readers; without effect
        self._decoded: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> Shaped[np.ndarray, ...]:
        """A tensor as it is stored.

        Raises:
          UserError: its bytes are not those that were written, or no base-3 digits.
        """
        values = read_whole(self._reader, name)
        found, expected = zlib.crc32(as_bytes(values)), self.description.crc32[name]
        if found != expected:
            raise UserError(
                f"{self._what}: tensor `{name}` is damaged: its checksum is {found:08x}, expected "
                f"{expected:08x}; copy or download it again"
            )
        return values

    def packed(self, layer: str) -> UInt8[np.ndarray, "N Kp"]:
        """A layer's codes in the 2-bit layout."""
        columns = self.shapes[layer + WEIGHT][1]
        return base3_to_packed(self.read(layer + CODES), columns, what=layer + CODES)

    def packed_on(self, device: jax.Device, layer: str) -> UInt8[jax.Array, "N Kp"]:
        """As `packed`, decoded on a device."""
        columns = self.shapes[layer + WEIGHT][1]
        return base3_to_packed_on(device, self.read(layer + CODES), columns, what=layer + CODES)

    def codes(self, layer: str) -> UInt8[np.ndarray, "N K"]:
        """A layer's codes, 0, 1 and 2, one a byte."""
        columns = self.shapes[layer + WEIGHT][1]
        return unpack_base3(self.read(layer + CODES), columns, what=layer + CODES)

    def dense(self, name: str) -> Float[np.ndarray, ...]:
        """A parameter of the dense model, bfloat16: `scale * signs` plus the low-rank branch."""
        layer = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or layer + CODES not in self.stored:
            return self.read(name)
        signs = self.codes(layer).astype(np.float32) - 1
        scale = self.read(f"{layer}.scale").astype(np.float32)
        if scale.ndim == 2:
            scale = np.repeat(scale, GROUP, axis=1)[:, : signs.shape[1]]
        weight = signs * (scale[:, None] if scale.ndim == 1 else scale)
        if self.description.quant.rank:
            a, b = (
                self.read(f"{layer}.{part}").astype(np.float32)
                for part in ("low_rank_a", "low_rank_b")
            )
            weight += b @ a
        return weight.astype(BFLOAT16)

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        """Some rows of a dense parameter; see `convert.tensors.Reader`."""
        if self._decoded is None or self._decoded[0] != name:
            spec = self.specs[name]
            self._decoded = (name, self.dense(name).reshape(spec.rows, *spec.row_shape))
        out[...] = self._decoded[1][row : row + out.shape[0]]

    def abstract_module(self, dtype: Any) -> FluxTransformer:
        """The transformer in shapes alone, as `load_module` gives it."""
        return abstract_ternary(self.config, self.layers, self.description.quant, dtype)

    def load_module(
        self,
        dtype: Any,
        place: Callable[[nnx.Module], Mapping[str, jax.sharding.Sharding]] | None = None,
    ) -> FluxTransformer:
        """The transformer, its packed weights on their devices.

        Neither the host nor a device ever holds a dense weight.

        Args:
          dtype: of the computation and of what is not packed.
          place: from the module's shapes to where each parameter goes; None for JAX's default
            device.

        Raises:
          UserError: a damaged tensor, by name.
        """
        module = self.abstract_module(dtype)
        rebuild, flat = split_flat(module)
        one = jax.sharding.SingleDeviceSharding(default_device())
        places = dict.fromkeys(flat, one) if place is None else place(module)

        def bring(name: str) -> jax.Array:
            layer, last = name.rpartition(".")[::2]
            if last == "packed" and (device := _decoder(places[name])) is not None:
                packed = self.packed_on(device, layer)
                return jax.device_put(packed, places[name]).block_until_ready()
            host = self.packed(layer) if last == "packed" else self.read(name)
            host = host.astype(flat[name].dtype, copy=False)
            return jax.make_array_from_callback(
                host.shape, places[name], lambda index: host[index]
            ).block_until_ready()

        # Each thread has one tensor on its way.
        with ThreadPoolExecutor(_LOADERS) as pool:
            return rebuild(dict(zip(flat, pool.map(bring, flat), strict=True)))

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def _decoder(place: jax.sharding.Sharding) -> jax.Device | None:
    """The device that decodes what goes to `place`; None leaves it to the host."""
    first = min(place.addressable_devices, key=lambda device: device.id)
    return first if place.is_fully_addressable and first.platform != "cpu" else None


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[TernaryCheckpoint]:
    """Open a transformer's folder, or that of its pipeline, for the length of the block.

    Raises:
      UserError: see `TernaryCheckpoint`.
    """
    inner = folder / "transformer"
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {found}, expected a ternary checkpoint")
    transformer = inner if inner.is_dir() else folder
    if not (transformer / "config.json").is_file():
        raise UserError(f"{folder}: no ternary checkpoint: {transformer} has no config.json")
    checkpoint = TernaryCheckpoint(transformer)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def dense_shapes(config: FluxConfig) -> dict[str, Shape]:
    """Shapes of a dense transformer's parameters by path."""
    return tables.our_shapes("transformer", config)


def abstract_ternary(
    config: FluxConfig, layers: list[str], quant: QuantConfig, dtype: Any
) -> FluxTransformer:
    """A transformer with ternary linears, of shapes alone."""
    module = abstract_module("transformer", config, dtype)

    # Hundreds of linears have a handful of shapes.
    @functools.cache
    def parts(columns: int, rows: int, bias: bool, axes: tuple[Any, ...]) -> tuple[Any, Any]:
        return nnx.split(
            nnx.eval_shape(
                lambda: TernaryLinear(columns, rows, quant, bias=bias, axes=axes, dtype=dtype)
            )
        )

    def make(name: str, linear: Any) -> TernaryLinear:
        rows, columns = linear.weight.shape
        axes = linear.weight.get_metadata()["axes"]
        return nnx.merge(*parts(columns, rows, linear.bias is not None, axes), copy=True)

    replace_linears(module, layers, make)
    return module
