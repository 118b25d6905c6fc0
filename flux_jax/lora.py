"""LoRAs (arXiv 2106.09685): low-rank changes of a transformer's linears, put beside them.

Nothing is merged. A ternary weight would lose the change, which is far below the step between its
levels, and a bf16 weight would round part of it away; beside the weight it acts in full, on a
1.58-bit student as on its teacher, and can be taken off again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from flux_jax import arguments
from flux_jax.components import abstract_module
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.inputs import Branch, Hidden, Input, joined
from flux_jax.layers import AnyLinear
from flux_jax.linears import linears, replace_linears
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import to_flat


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """A change `b @ a` of one linear's weight.

    Attributes:
      a: (R, K) float32.
      b: (N, R) float32.
    """

    a: Float[np.ndarray, "R K"]
    b: Float[np.ndarray, "N R"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """The changes of a transformer's linears that belong together.

    Attributes:
      path: where they were read from, as it was given.
      layers: by the linears' dotted paths.
      scale: by which all are multiplied.
    """

    path: str
    layers: Mapping[str, LowRank]
    scale: float = 1.0

    def __str__(self) -> str:
        """As a command line takes it."""
        short = f"{self.scale:g}"
        return f"{self.path}:{short if float(short) == self.scale else repr(self.scale)}"


class LoRALinear(AnyLinear):
    """A linear, and what LoRAs add to it.

    Attributes:
      base: the linear of any kind, as it was.
      lora_a, lora_b: (R, K) and (N, R), the LoRAs' scales in the second; several LoRAs lie one
        after the other along R.
    """

    def __init__(self, base: AnyLinear, a: Float[Any, "R K"], b: Float[Any, "N R"]):
        self.base = base
        # Their rank has no name: every device has all of it.
        self.lora_a = nnx.Param(a, axes=(None, None))
        self.lora_b = nnx.Param(b, axes=(None, None))

    @property
    def bias(self) -> nnx.Param | None:
        """The base's, which tells where and in which type a transformer computes."""
        return getattr(self.base, "bias", None)

    def __call__(
        self,
        x: Input,
        *,
        gate: Float[Array, "B N"] | None = None,
        residual: Float[Array, "*L N"] | None = None,
        branch: Branch | None = None,
    ) -> Float[Array, "*L N"]:
        """See `AnyLinear`; it is up to the base what is computed together."""
        return self.base(x, gate=gate, residual=residual, branch=self._with(branch))

    def hidden(self, x: Input, start: int = 0, *, branch: Branch | None = None) -> Hidden:
        """See `AnyLinear`."""
        return self.base.hidden(x, start, branch=self._with(branch))

    def apart(
        self, x: Input, start: int, *, branch: Branch | None = None
    ) -> tuple[Float[Array, "*L _"], Hidden]:
        """See `AnyLinear`."""
        return self.base.apart(x, start, branch=self._with(branch))

    def _with(self, branch: Branch | None) -> Branch | None:
        return joined(Branch(self.lora_a[...], self.lora_b[...]), branch)


def linear_shapes(config: FluxConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear's weight, by the linear's path."""
    flat = to_flat(abstract_module("transformer", config))
    return {
        name.removesuffix(".weight"): value.shape
        for name, value in flat.items()
        if name.endswith(".weight") and len(value.shape) == 2
    }


def check_no_lora(module: nnx.Module) -> None:
    """Raises UserError where LoRAs stand beside weights: they are no part of a checkpoint."""
    if linears(module, LoRALinear):
        raise UserError("the transformer has LoRAs beside its weights: unload them first")


def check_fits(lora: LoRA, config: FluxConfig) -> None:
    """Whether a transformer of this configuration has what a LoRA changes.

    Raises:
      UserError: it changes a linear that is not there, or of another shape, or by nothing.
    """
    shapes = linear_shapes(config)
    for path, change in lora.layers.items():
        changed = (change.b.shape[0], change.a.shape[1])
        if shapes.get(path) != changed or change.a.shape[0] != change.b.shape[1]:
            raise UserError(
                f"{lora.path}: changes {path} by {change.b.shape} x {change.a.shape}, here it is "
                f"{'no linear' if path not in shapes else f'of shape {shapes[path]}'}"
            )
        if change.a.shape[0] == 0:
            raise UserError(f"{lora.path}: changes {path} by rank 0, which is no change")


def attach(transformer: FluxTransformer, lora: LoRA) -> None:
    """Put a LoRA beside the linears that it changes, and beside the LoRAs that are there.

    Args:
      transformer: is changed. Of one in shapes alone, the LoRA has shapes alone too.
      lora: of a transformer of this configuration.

    Raises:
      UserError: it changes a linear that is not there, or of another shape, or by nothing; or its
        scale is not finite. Nothing was changed.
    """
    scale = arguments.finite("the scale of a LoRA", lora.scale)
    found = linears(transformer, AnyLinear)
    check_fits(lora, transformer.config)
    example = transformer.img_in.bias
    assert example is not None
    shapes_only = isinstance(example.get_value(), jax.ShapeDtypeStruct)

    # Small, and whole on every device. The base stays where it is.
    mesh = None if shapes_only else transformer.mesh
    place = None if shapes_only else transformer.device
    if mesh is not None:
        place = NamedSharding(mesh, PartitionSpec())

    def made(value: np.ndarray) -> Any:
        if shapes_only:
            return jax.ShapeDtypeStruct(value.shape, example.get_value().dtype)
        return jax.device_put(np.asarray(value, transformer.dtype), place)

    def beside(path: str, linear: AnyLinear) -> AnyLinear:
        change = lora.layers[path]
        a, b = change.a, change.b * np.float32(scale)
        if isinstance(linear, LoRALinear):
            a = np.concatenate((_host(linear.lora_a), a))
            b = np.concatenate((_host(linear.lora_b), b), axis=1)
            linear = linear.base
        return LoRALinear(linear, made(a), made(b))

    replace_linears(transformer, [path for path in found if path in lora.layers], beside)


def detach(transformer: FluxTransformer) -> None:
    """Take all LoRAs off; the linears are those that were there before.

    Args:
      transformer: is changed.
    """
    replace_linears(
        transformer, list(linears(transformer, LoRALinear)), lambda _, linear: linear.base
    )


def attached(transformer: FluxTransformer) -> LoRA:
    """What LoRAs have put beside a transformer's weights, as one, its scale 1.

    Raises:
      UserError: there is none.
    """
    layers = {
        path: LowRank(_host(linear.lora_a), _host(linear.lora_b))
        for path, linear in linears(transformer, LoRALinear).items()
    }
    if not layers:
        raise UserError("the transformer has no LoRA beside its weights")
    return LoRA(path="the transformer", layers=layers)


def read_name(text: str) -> tuple[str, float]:
    """Path and scale of a LoRA as a command line has it: PATH or PATH:SCALE.

    Raises:
      UserError: a scale that is not finite.
    """
    path, colon, tail = text.rpartition(":")
    try:
        scale = float(tail)
    except ValueError:
        colon = ""
    if not colon:
        # No scale: a colon may be part of a path.
        return text, 1.0
    return path, arguments.finite("the scale of a LoRA", scale)


def _host(param: nnx.Param) -> np.ndarray:
    value = param.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        return np.zeros(value.shape, np.float32)
    return np.asarray(value, np.float32)
