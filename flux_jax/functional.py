"""Compiled functions of a module whose weights are arguments, never constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


@dataclasses.dataclass(frozen=True)
class BoundFunction:
    """A compiled function with its module's arrays filled in.

    Attributes:
      sharding: where its arguments must be (host arrays are brought there) and its results are.
    """

    program: Callable[..., Any]
    leaves: list[Any]
    sharding: Sharding

    def __call__(self, *args: Any) -> Any:
        return self.program(self.leaves, args)

    def work_bytes(self, *args: Any) -> int:
        """Bytes of the results and intermediate values, as the compiler plans them.

        Nothing runs: of `args` and the bound module, shapes (`jax.ShapeDtypeStruct`) are enough.
        """
        stats: Any = self.lower(*args).compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for `args`, traced and lowered; a later call finds it so, and compiled.

        Of `args` and the bound module, shapes are enough.
        """
        return self.program.lower(self.leaves, args)

    def place(self, tree: Any) -> Any:
        """`tree` on the devices of the function, from wherever its arrays are."""
        return jax.device_put(tree, self.sharding)


class ModuleFunction:
    """`jax.jit` of `function(module, *args)`, compiled once per structure and argument shapes.

    A module is split into its structure, which selects the program, and its arrays, which are
    passed to it on each call. Two modules of one configuration share their programs, and swapping
    a module's layers (a ternary linear for a dense one) selects another by itself.

    Example:
      decode = ModuleFunction(lambda vae, latents: vae.decode(latents))
      images = decode.bind(pipe.vae)(latents)
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._programs: dict[Any, Any] = {}

    def bind(self, module: nnx.Module, **static: Any) -> BoundFunction:
        """The function with `module` and `static` fixed.

        Binding walks the module (milliseconds), calling does not: bind before a loop. A bound
        function keeps the arrays it was bound to.

        Args:
          module: any nnx module; its arrays all on one device, or all on one mesh.
          **static: hashable keyword arguments of the function; they select the program.
        """
        graphdef, state = nnx.split(module)
        leaves, treedef = jax.tree.flatten(state)
        sharding = common_sharding(leaves)
        key = (graphdef, treedef, sharding, tuple(sorted(static.items())))
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._compile(graphdef, treedef, sharding, static)
        return BoundFunction(program, leaves, sharding)

    def _compile(self, graphdef: Any, treedef: Any, sharding: Sharding, static: dict) -> Any:
        def call(leaves: list, args: tuple) -> Any:
            module = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            return self._function(module, *args, **static)

        call.__name__ = getattr(self._function, "__name__", "call")
        # Fixed placements keep one program per shape: jit compiles anew for an argument that is
        # committed elsewhere, or not yet committed at all.
        return jax.jit(call, in_shardings=(None, sharding), out_shardings=sharding)


def common_sharding(leaves: list[Any]) -> Sharding:
    """Where the inputs and outputs of a module go: its device, or replicated over its mesh.

    Shapes alone go to the default device. Arrays in host memory have no say.
    """
    sharding = next(leaf.sharding for leaf in leaves if not isinstance(leaf, np.ndarray))
    if sharding is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
