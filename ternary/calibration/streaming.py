"""A transformer that does not fit the device: its parts pass over it, one after another.

The weights lie in host memory. A part (the embedders, one block, the final layer) comes to the
device, every sample passes it, and it makes room for the next, which is on its way meanwhile. So
the device holds two parts' weights, whatever the depth, and each weight is sent once for all
samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Shaped

from convert.transforms import Shape
from flux_jax.components import abstract_module
from flux_jax.configs import FluxConfig
from flux_jax.kernels import leave_to_xla
from flux_jax.rope import Rotation
from flux_jax.tree import Flat
from pallas_kernels.backends import default_device
from ternary.storage.source import Pipeline

# What a part computes, by its kind: each output is (B, tokens, channels), `vec` (B, channels).
OUTPUTS = {
    "embed": ("img", "txt", "vec"),
    "double": ("img", "txt"),
    "single": ("img", "txt"),
    "final": ("velocity",),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the transformer.

    Attributes:
      name: "embedders", "double_blocks.3", "single_blocks.0", "final_layer".
      kind: a key of `OUTPUTS`.
      prefix: of its parameters' names, with the dot.
    """

    name: str
    kind: str
    prefix: str


def parts_of(config: FluxConfig) -> list[Part]:
    """All parts in the order in which a sample passes them."""
    doubles = [f"double_blocks.{i}" for i in range(config.depth)]
    singles = [f"single_blocks.{i}" for i in range(config.depth_single_blocks)]
    return [
        Part("embedders", "embed", ""),
        *(Part(name, "double", f"{name}.") for name in doubles),
        *(Part(name, "single", f"{name}.") for name in singles),
        Part("final_layer", "final", "final_layer."),
    ]


def part_name(parameter: str) -> str:
    """The part that a parameter belongs to."""
    first, _, rest = parameter.partition(".")
    if first in ("double_blocks", "single_blocks"):
        return f"{first}.{rest.partition('.')[0]}"
    return first if first == "final_layer" else "embedders"


def abstract_part(config: FluxConfig, kind: str, dtype: Any) -> Any:
    """A part's module, of shapes alone."""
    model = abstract_module(
        "transformer", dataclasses.replace(config, depth=1, depth_single_blocks=1), dtype
    )
    leave_to_xla(model)
    if kind == "double":
        return model.double_blocks[0]
    if kind == "single":
        return model.single_blocks[0]
    if kind == "final":
        return model.final_layer
    model.double_blocks, model.single_blocks = nnx.List([]), nnx.List([])
    model.final_layer = None
    return model


def apply_part(kind: str, module: Any, inputs: Flat, rotation: Rotation, dtype: Any) -> Flat:
    """What a part makes of a batch; the same arithmetic as `FluxTransformer.__call__`.

    Args:
      kind: of the part.
      module: the part.
      inputs: of the embedders: x (B, I, P), sigma and guidance (B,), txt (B, T, K) and pooled
        (B, V); of a block: img (B, I, C), txt (B, T, C), vec (B, C); of the final layer: img, vec.
      rotation: angles of all T + I positions.
      dtype: of the computation.

    Returns:
      The outputs that `OUTPUTS` names.
    """
    if kind == "embed":
        guidance = inputs["guidance"] if module.guidance_in is not None else None
        return {
            "img": module.img_in(inputs["x"].astype(dtype)),
            "txt": module.txt_in(inputs["txt"].astype(dtype)),
            "vec": module.conditioning(inputs["sigma"], inputs["pooled"], guidance),
        }
    img, vec = inputs["img"], inputs["vec"]
    if kind == "final":
        return {"velocity": module(img, module.modulation(vec))}
    txt = inputs["txt"]
    if kind == "double":
        img, txt = module(img, txt, (module.img_mod(vec), module.txt_mod(vec)), rotation)
        return {"img": img, "txt": txt}
    joined = module(jnp.concatenate((txt, img), axis=1), module.modulation(vec), rotation)
    return {"img": joined[:, txt.shape[1] :], "txt": joined[:, : txt.shape[1]]}


class HostWeights:
    """A dense transformer in host memory.

    Attributes:
      config: its hyper-parameters.
      parts: its parts in order.
    """

    def __init__(self, config: FluxConfig, tensors: Mapping[str, np.ndarray]):
        """Weights that are there already.

        Args:
          config: of the transformer.
          tensors: every parameter by its path.
        """
        self.config = config
        self.parts = parts_of(config)
        self._tensors: dict[str, dict[str, np.ndarray]] = {part.name: {} for part in self.parts}
        prefixes = {part.name: part.prefix for part in self.parts}
        for name, values in tensors.items():
            part = part_name(name)
            self._tensors[part][name.removeprefix(prefixes[part])] = values

    @classmethod
    def read(
        cls,
        pipeline: Pipeline,
        dtype: Any,
        on_bytes: Callable[[int, int], None] = lambda done, total: None,
    ) -> HostWeights:
        """All weights of an opened checkpoint.

        Args:
          pipeline: where they are.
          dtype: that they shall have, bfloat16 or float32.
          on_bytes: told the bytes that are read, of how many.

        Raises:
          UserError: they cannot be read.
        """
        tensors, dtype = {}, np.dtype(dtype)
        done = 0
        total = dtype.itemsize * sum(math.prod(shape) for shape in pipeline.shapes.values())
        for name in pipeline.shapes:
            tensors[name] = pipeline.read(name).astype(dtype, copy=False)
            done += tensors[name].nbytes
            on_bytes(done, total)
        return cls(pipeline.config, tensors)

    def part(self, part: Part) -> dict[str, np.ndarray]:
        """A part's parameters, by their paths within it."""
        return self._tensors[part.name]

    def shapes(self) -> dict[str, Shape]:
        """The shape of every parameter, by its full path."""
        return {
            part.prefix + name: values.shape
            for part in self.parts
            for name, values in self.part(part).items()
        }


def stream(
    parts: Sequence[Part],
    load: Callable[[Part], Any],
    use: Callable[[Part, Any], None],
) -> None:
    """`use(part, load(part))` for each part, the next one loading meanwhile.

    What was loaded is dropped before the next but one is: two parts are there at a time. `use`
    should return when the device is done, or more would be.
    """
    # Chosen by `with jax.default_device`, it is known to the caller's thread alone.
    device = default_device()

    def loaded_there(part: Part) -> Any:
        with jax.default_device(device):
            return load(part)

    with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
        coming = pool.submit(loaded_there, parts[0]) if parts else None
        for number, part in enumerate(parts):
            assert coming is not None
            loaded = coming.result()
            more = number + 1 < len(parts)
            coming = pool.submit(loaded_there, parts[number + 1]) if more else None
            use(part, loaded)
            del loaded


def send(arrays: Mapping[str, np.ndarray]) -> Flat:
    """Host arrays on their way to the device."""
    return jax.device_put(dict(arrays))


def batches(count: int, size: int) -> list[Int[np.ndarray, " B"]]:
    """Rows 0 to `count` in batches of one size; the last is filled up with the last row."""
    rows = np.arange(-(-count // size) * size)
    return list(np.minimum(rows, count - 1).reshape(-1, size))


class Streams:
    """The samples between two parts: `img`, `txt` and `vec` of each.

    On the host by default. On the device, where all of them fit beside the parts, nothing but the
    weights is sent.

    Attributes:
      count: samples.
      batches: their rows, a batch at a time.
    """

    def __init__(self, count: int, batch_size: int, *, on_device: bool = False):
        self.count = count
        self.batches = batches(count, batch_size)
        self._on_device = on_device
        self._host: dict[str, np.ndarray] = {}
        self._device: list[dict[str, Any]] = [{} for _ in self.batches]

    def batch(self, number: int) -> dict[str, Any]:
        """A batch, wherever it is."""
        return self._device[number] if self._on_device else self.rows(self.batches[number])

    def rows(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Copies of some samples; of streams on the host."""
        return {name: take_rows(values, rows) for name, values in self._host.items()}

    def keep(self, number: int, outputs: Flat) -> None:
        """Take a part's outputs in the place of its inputs."""
        if self._on_device:
            self._device[number] = {**self._device[number], **outputs}
            return
        rows = self.batches[number]
        real = len(rows) if number + 1 < len(self.batches) else self.count - rows[0]
        for name, value in outputs.items():
            value = np.asarray(value)
            if name not in self._host:
                self._host[name] = np.empty((self.count, *value.shape[1:]), value.dtype)
            self._host[name][rows[:real]] = value[:real]

    def array(self, name: str) -> Float[np.ndarray, "N ..."]:
        """One of the streams, of all samples."""
        if not self._on_device:
            return self._host[name]
        return np.concatenate([np.asarray(b[name]) for b in self._device])[: self.count]


def take_rows(
    values: Shaped[np.ndarray, "N ..."], rows: Int[np.ndarray, " B"]
) -> Shaped[np.ndarray, "B ..."]:
    """`values[rows]`; NumPy copies its own types 20 times as fast as ml_dtypes' bfloat16."""
    plain = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    return plain[rows].view(values.dtype)


def stream_bytes(config: FluxConfig, tokens: int, dtype: Any) -> int:
    """Bytes of one sample between two parts.

    Args:
      config: of the transformer.
      tokens: image and text tokens together.
      dtype: of the streams.
    """
    return (tokens + 1) * config.hidden_size * jnp.dtype(dtype).itemsize


def pass_part(
    streams: Streams,
    inputs: Callable[[int], Flat],
    program: Callable[[Flat], Flat],
) -> None:
    """Every batch through one part.

    Args:
      streams: takes the outputs.
      inputs: of a batch, by its number.
      program: the part's.
    """
    waiting: tuple[int, Flat] | None = None
    for number in range(len(streams.batches)):
        outputs = program(inputs(number))
        # One behind, so that the device has work while the host copies.
        if waiting is not None:
            streams.keep(*waiting)
        waiting = number, outputs
    if waiting is not None:
        streams.keep(*waiting)
        jax.block_until_ready(waiting[1])
