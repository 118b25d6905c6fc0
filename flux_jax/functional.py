"""Compiled functions of a module whose weights are arguments, never constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from flux_jax.compile_cache import lowered_folder
from flux_jax.partition import mesh_in_scope
from flux_jax.sharding import axis_size
from flux_jax.stored import StoredProgram, has_own_name, is_ours
from pallas_kernels.backends import default_device

Axes = tuple[str | None, ...]
# The dimensions of arguments that a mesh may divide when it draws, and the axes of it that do.
# For training `flux_jax.sharding.DEFAULT_RULES` says so, where `fsdp` divides examples too; when
# drawing, it splits weights alone, as `tensor` does.
SPLIT = {"batch": "data", "sequence": "sequence"}


@dataclasses.dataclass(frozen=True)
class BoundFunction:
    """A compiled function with its module's arrays filled in.

    Attributes:
      program: the compiled function of (arrays, arguments).
      leaves: the module's arrays.
      sharding: where its arguments must be (host arrays are brought there) and its results are:
        one device, or all of a mesh alike.
      arguments: of each argument, where it is split over the mesh instead.
    """

    program: Callable[..., Any]
    leaves: list[Any]
    sharding: Sharding
    arguments: tuple[Sharding, ...] | None = None

    def __call__(self, *args: Any) -> Any:
        if any(isinstance(arg, np.ndarray | np.generic) for arg in args):
            # Explicitly, for who forbids other transfers (`jax_transfer_guard`).
            args = self.place(*args)
        return self.program(self.leaves, args)

    def work_bytes(self, *args: Any) -> int:
        """Bytes of the results and intermediate values, as the compiler plans them.

        Nothing runs: of `args` and the bound module, shapes (`jax.ShapeDtypeStruct`) are enough.
        """
        stats: Any = self.lower(*args).compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for `args`, traced and lowered; a later call does not trace it again.

        Nor compile it, after `compile()` of what this returns. Of `args` and the bound module,
        shapes are enough.
        """
        return self.program.lower(self.leaves, args)

    @property
    def parts(self) -> int:
        """Among how many groups of devices a batch is divided."""
        mesh = getattr(self.sharding, "mesh", None)
        return 1 if self.arguments is None or mesh is None else axis_size(mesh, SPLIT["batch"])

    def place(self, *args: Any) -> tuple[Any, ...]:
        """The first arguments on the devices of the function, from wherever their arrays are."""
        if self.arguments is None:
            return jax.device_put(args, self.sharding)
        places = zip(args, self.arguments, strict=False)
        return tuple(jax.device_put(argument, place) for argument, place in places)


@dataclasses.dataclass(frozen=True)
class SplitModule:
    """A module taken apart, to bind several functions to it.

    The device waits meanwhile. Taken apart as a pytree: of FLUX.1's transformer that takes some
    6 ms of Python, where `nnx.split`, which also looks for what is shared, takes 37.

    Attributes:
      module: the module as it was.
      treedef: its structure.
      leaves: its arrays.
    """

    module: nnx.Module
    treedef: Any
    leaves: list[Any]

    @classmethod
    def of(cls, module: nnx.Module) -> SplitModule:
        """A module's structure and arrays as they are now."""
        leaves, treedef = jax.tree.flatten(module)
        return cls(module=module, treedef=treedef, leaves=leaves)


class ModuleFunction:
    """`jax.jit` of `function(module, *args)`, compiled once per structure and argument shapes.

    A module is split into its structure, which selects the program, and its arrays, which are
    passed to it on each call. Two modules of one configuration share their programs, and swapping
    a module's layers (a ternary linear for a dense one) selects another by itself.

    Example:
      decode = ModuleFunction(lambda vae, latents: vae.decode(latents))
      images = decode.bind(pipe.vae)(latents)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        arguments: tuple[Axes, ...] | None = None,
        result: Axes = (),
        compiler_splits: frozenset[str] = frozenset(),
    ):
        """A function, and which dimensions of its arguments a mesh may divide.

        On a mesh with such axes the function is one device's: it is called with its part of the
        arguments (`jax.shard_map`), so that it computes and rounds what it would there alone, and
        may call kernels. Axes that only parameters are split over are left to the compiler.

        Args:
          function: of a module and arrays.
          arguments: of each argument, the names of its first dimensions, as in `SPLIT`; by default
            every device has all of them.
          result: of the result.
          compiler_splits: axes of a mesh over which the function says itself what is divided
            (`partition.constrain`). Where one of them has several devices, all of the function is
            left to the compiler.
        """
        self._function = function
        self._arguments = arguments
        self._result = result
        self._compiler_splits = compiler_splits
        self._programs: dict[Any, Any] = {}

    def bind(self, module: nnx.Module | SplitModule, **static: Any) -> BoundFunction:
        """The function with `module` and `static` fixed.

        Binding walks the module, calling does not: bind before a loop. A bound function keeps the
        arrays it was bound to.

        Args:
          module: any nnx module, or one taken apart; its arrays all on one device, or all on one
            mesh.
          **static: hashable keyword arguments of the function; they select the program.
        """
        split_module = module if isinstance(module, SplitModule) else SplitModule.of(module)
        treedef, leaves = split_module.treedef, split_module.leaves
        sharding = common_sharding(leaves)
        key = (treedef, sharding, tuple(sorted(static.items())))
        program = self._programs.get(key)
        split = self._split_axes(sharding)
        if program is None:
            can_be_stored = (
                has_own_name(self._function)
                and _is_default(sharding)
                and is_ours(split_module.module)
            )
            folder = lowered_folder() if can_be_stored else None
            program = self._compile(treedef, sharding, split, static, folder)
            self._programs[key] = program
        if not split or not isinstance(sharding, NamedSharding):
            return BoundFunction(program, leaves, sharding)
        return BoundFunction(program, leaves, sharding, self._places(sharding, split))

    def _split_axes(self, sharding: Sharding) -> frozenset[str]:
        """The axes of the mesh that divide arguments."""
        if self._arguments is None or not isinstance(sharding, NamedSharding):
            return frozenset()
        return frozenset(axis for axis in SPLIT.values() if axis_size(sharding.mesh, axis) > 1)

    def _places(self, sharding: NamedSharding, split: frozenset[str]) -> tuple[NamedSharding, ...]:
        return tuple(_place(sharding, axes, split) for axes in self._arguments or ())

    def _compile(
        self,
        treedef: Any,
        sharding: Sharding,
        split: frozenset[str],
        static: dict[str, Any],
        folder: Path | None,
    ) -> Any:
        """The program of a structure and its place.

        Args:
          treedef: of the module.
          sharding: of its arrays.
          split: axes of the mesh that divide arguments.
          static: keyword arguments of the function.
          folder: of lowered programs; None to keep none.
        """

        def call(leaves: list, args: tuple) -> Any:
            module = jax.tree.unflatten(treedef, leaves)
            return self._function(module, *args, **static)

        call.__name__ = getattr(self._function, "__name__", "call")
        if split and isinstance(sharding, NamedSharding):
            if split & self._compiler_splits:
                return self._by_the_compiler(call, sharding, split)
            return self._on_each_device(call, sharding, split)
        # Fixed placements keep one program per shape: jit compiles anew for an argument that is
        # committed elsewhere, or not yet committed at all.
        options: dict[str, Any] = {"in_shardings": (None, sharding), "out_shardings": sharding}
        if folder is None:
            return jax.jit(call, **options)
        made_of = (self._function.__module__, self._function.__qualname__)
        made_of += (treedef, sorted(static.items()))
        return StoredProgram(call, folder, made_of, **options)

    def _by_the_compiler(
        self, call: Callable[..., Any], sharding: NamedSharding, split: frozenset[str]
    ) -> Any:
        """A program that the compiler divides over the mesh, as the function says itself."""

        def scoped(leaves: list, args: tuple) -> Any:
            with mesh_in_scope(sharding.mesh):
                return call(leaves, args)

        scoped.__name__ = call.__name__
        return self._jit_split(scoped, sharding, split)

    def _on_each_device(
        self, call: Callable[..., Any], sharding: NamedSharding, split: frozenset[str]
    ) -> Any:
        """A program that each device runs on its part of the arguments."""
        mesh = sharding.mesh
        others = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in split]
        part = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(
                PartitionSpec(),
                tuple(place.spec for place in self._places(sharding, split)),
            ),
            out_specs=_place(sharding, self._result, split).spec,
            # Where nothing is left to the compiler, it is told so: kernels want that.
            axis_names=split if others else frozenset(mesh.axis_names),
            # Kernels do not say over which axes their results vary.
            check_vma=False,
        )
        part.__name__ = call.__name__
        return self._jit_split(part, sharding, split)

    def _jit_split(
        self, call: Callable[..., Any], sharding: NamedSharding, split: frozenset[str]
    ) -> Any:
        """`call` compiled for arguments and a result that lie divided over the mesh."""
        return jax.jit(
            call,
            in_shardings=(None, self._places(sharding, split)),
            out_shardings=_place(sharding, self._result, split),
        )


def _is_default(sharding: Sharding) -> bool:
    """Whether it is one device of the kind that programs are lowered for by default."""
    if not isinstance(sharding, SingleDeviceSharding):
        return False
    (device,) = sharding.device_set
    return device.platform == jax.default_backend()


def _place(sharding: NamedSharding, axes: Axes, split: frozenset[str]) -> NamedSharding:
    """Where an argument lies whose dimensions have these names."""
    named = (None if axis is None else SPLIT[axis] for axis in axes)
    spec = PartitionSpec(*(axis if axis in split else None for axis in named))
    return NamedSharding(sharding.mesh, spec)


def common_sharding(leaves: list[Any]) -> Sharding:
    """Where the inputs and outputs of a module go: its device, or replicated over its mesh.

    Shapes alone go to the default device. Arrays in host memory have no say.

    Raises:
      ValueError: all are in host memory.
    """
    placed = next((leaf for leaf in leaves if not isinstance(leaf, np.ndarray)), None)
    if placed is None:
        raise ValueError(
            f"all {len(leaves)} arrays of the module are in host memory: bring them to a device "
            "first (`jax.device_put`)"
        )
    sharding = placed.sharding
    if sharding is None:
        return SingleDeviceSharding(default_device())
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
