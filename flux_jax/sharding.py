"""From the logical axes of a parameter to the axes of a device mesh: one table.

A module names its axes ("embed", "heads", ...) and knows no mesh. `DEFAULT_RULES` says where each
name goes; a mesh without an axis, or a dimension that the axis does not divide, leaves that
dimension replicated. Activations are named the same way (`flux_jax.partition`). What a compiled
call divides of its arguments when it draws is `flux_jax.functional.SPLIT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from flux_jax.errors import UserError
from flux_jax.tree import parameter_path
from pallas_kernels.backends import default_device

Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = {
    # Devices that share a weight by `fsdp` have examples of their own, and gather it to use it.
    "batch": ("data", "fsdp"),
    # `fsdp` splits the first dimension of a weight that has a name and divides: the parts then lie
    # one after the other, and gathering them needs no transpose.
    "embed": "fsdp",
    # Outputs of the wide products; a head stays whole.
    "heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "vocab": ("tensor", "fsdp"),
    # Convolutions are small.
    "conv_in": None,
    "conv_out": None,
    # Of a picture that is decoded.
    "rows": "sequence",
}

# Dimensions of a parameter that `fsdp` splits. Vectors stay whole: they are a few thousandths of
# the bytes, and gathering them takes as many messages as the weights.
_LEAST_SPLIT = 2

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are laid out.

    Attributes:
      data: parts of the batch; None for as many as there are devices left.
      fsdp: parts of the batch, and of every weight; for training.
      sequence: parts of each image's tokens, with whole parameters; for drawing.
      tensor: parts of the parameters' wide dimensions.
    """

    data: int | None = None
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _check_sizes(vars(self))

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh; see `make_mesh`."""
        return make_mesh(
            data=self.data,
            fsdp=self.fsdp,
            sequence=self.sequence,
            tensor=self.tensor,
            devices=devices,
        )


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not whole and not (name == "data" and size is None):
            raise UserError(f"mesh axis {name} must be a whole number above 0, got {size!r}")


def read_mesh(text: str) -> MeshConfig:
    """A mesh as a command line has it: "data=4,fsdp=2".

    Raises:
      UserError: an axis that does not exist or comes twice, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not size.strip().isdecimal():
            raise UserError(
                f"a mesh is written AXIS=SIZE,... with axes of {', '.join(MESH_AXES)}, each at "
                f"most once, as data=4,fsdp=2; got {text!r}"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def make_mesh(
    *,
    data: int | None = 1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes of `MESH_AXES` over the first data x fsdp x sequence x tensor devices.

    The devices of a process are neighbours in the last axes, whose traffic is the heaviest.

    Args:
      data: None for as many as there are devices left by the other axes.
      fsdp, sequence, tensor: see `MeshConfig`.
      devices: to choose from; by default those of all processes, each of which must then have a
        part in the mesh.

    Raises:
      UserError: a size that is none, fewer devices are there, or a process would have none of the
        mesh's.
    """
    _check_sizes({"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor})
    everybody = devices is None
    devices = jax.devices() if devices is None else devices
    inner = fsdp * sequence * tensor
    data = max(len(devices) // inner, 1) if data is None else data
    wanted = data * inner
    sizes = dict(zip(MESH_AXES, (data, fsdp, sequence, tensor), strict=True))
    split = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    shown = f"a mesh of {split or 'one device'}"
    if len(devices) < wanted:
        here = "1 is" if len(devices) == 1 else f"{len(devices)} are"
        raise UserError(f"{shown} needs {wanted} devices, {here} here")
    chosen = devices[:wanted]
    processes = {device.process_index for device in chosen}
    if everybody and len(processes) < jax.process_count():
        raise UserError(
            f"{shown} uses {wanted} of {len(devices)} devices, which leaves out "
            f"{jax.process_count() - len(processes)} of {jax.process_count()} processes: start "
            f"fewer, or make the mesh larger"
        )
    return Mesh(np.array(chosen).reshape(tuple(sizes.values())), MESH_AXES)


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """The size of an axis, 1 if the mesh does not have it."""
    return mesh.shape.get(axis, 1)


@contextlib.contextmanager
def no_mesh_set() -> Iterator[None]:
    """What a caller's `jax.set_mesh` says has no effect: arrays say themselves where they lie.

    JAX would refuse arrays that lie on other devices than that mesh's, or on a mesh whose axes are
    of another kind.
    """
    if jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with jax.set_mesh(None):
        yield


def mesh_of(array: Any) -> Mesh | None:
    """The mesh that an array, or a shape with its placement, lies on; None if it is on none."""
    mesh = getattr(getattr(array, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def partition_spec(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...] | None,
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """Where one array lies on a mesh, by `DEFAULT_RULES`.

    Of several mesh axes for one name, each is left out that, with those before it, does not divide
    the dimension.

    Args:
      shape: of the array.
      axes: the logical name of each dimension; None for a replicated array.
      mesh: the device mesh.

    Raises:
      UserError: if a logical name is not in the rules.
    """
    rules = DEFAULT_RULES
    if axes is None:
        return PartitionSpec()
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in rules:
            raise UserError(f"no sharding rule for logical axis {name!r}; rules: {sorted(rules)}")
        rule = None if name is None else rules[name]
        wanted = (rule,) if isinstance(rule, str) else rule or ()
        found: list[str] = []
        for axis in wanted:
            there = axis in mesh.axis_names and axis not in used
            if there and size % math.prod(mesh.shape[name] for name in (*found, axis)) == 0:
                found.append(axis)
        used.update(found)
        entries.append((tuple(found) if len(found) > 1 else found[0]) if found else None)
    return PartitionSpec(*entries)


def without_axis(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """`spec` with what `axis` splits brought together."""

    def left(entry: Any) -> Any:
        if isinstance(entry, tuple):
            names = tuple(name for name in entry if name != axis)
            return names if len(names) > 1 else next(iter(names), None)
        return None if entry == axis else entry

    return PartitionSpec(*map(left, spec))


def shardings(state: Any, mesh: Mesh) -> Any:
    """A tree like `state` with a `NamedSharding` in place of each parameter's value.

    Args:
      state: an nnx state (concrete or from `nnx.eval_shape`) whose variables carry `axes`.
      mesh: the device mesh, whose axes are taken as `Auto`. Vectors are left whole by `fsdp`,
        whatever the rules say.
    """
    mesh = _with_auto_axes(mesh)

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes, shape = variable.get_metadata().get("axes"), variable.get_value().shape
        spec = partition_spec(shape, axes, mesh)
        if len(shape) < _LEAST_SPLIT:
            spec = without_axis(spec, "fsdp")
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _with_auto_axes(mesh: Mesh) -> Mesh:
    """The mesh with axes over which the compiler divides products, as our modules expect it.

    `jax.make_mesh` makes `Explicit` ones, with which every look-up would have to say where its
    result lies.
    """
    if all(kind is AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def spread(module: nnx.Module, mesh: Mesh) -> None:
    """Move a module's parameters to where they go on a mesh."""
    state = nnx.state(module)
    nnx.update(module, jax.device_put(state, shardings(state, mesh)))


def flat_shardings(module: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter of a module goes, by dotted path.

    Args:
      module: concrete, or from `nnx.eval_shape`.
      mesh: the device mesh.
    """
    tree = shardings(nnx.state(module), mesh)
    return {parameter_path(path): v.get_value() for path, v in nnx.to_flat_state(tree)}


def place_shapes(module: nnx.Module, mesh: Mesh | None) -> None:
    """Note in an abstract module's shapes where its arrays would be.

    Args:
      module: from `nnx.eval_shape`; it is changed.
      mesh: the device mesh; None for the default device.
    """
    state = nnx.state(module)
    one = SingleDeviceSharding(default_device())
    places = jax.tree.map(lambda _: one, state) if mesh is None else shardings(state, mesh)
    placed = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        state,
        places,
    )
    nnx.update(module, placed)
