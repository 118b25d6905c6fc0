"""From the logical axes of a parameter to the axes of a device mesh: one table.

A module names its axes ("embed", "heads", ...) and knows no mesh. `DEFAULT_RULES` says where each
name goes; a mesh without an axis, or a dimension that the axis does not divide, leaves that
dimension replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flux_jax.errors import UserError

Rules = Mapping[str, str | None]

# Output features of the wide products over `tensor` (heads stay whole), the residual width over
# `fsdp`. Convolutions are small and stay replicated.
DEFAULT_RULES: Rules = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "conv_in": None,
    "conv_out": None,
}

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh with the axes of `MESH_AXES` over the first data x fsdp x tensor devices.

    Raises:
      UserError: if fewer devices are there.
    """
    wanted = data * fsdp * tensor
    devices = jax.devices()
    if len(devices) < wanted:
        raise UserError(
            f"a mesh of data={data} fsdp={fsdp} tensor={tensor} needs {wanted} devices, "
            f"{len(devices)} are here"
        )
    return Mesh(np.array(devices[:wanted]).reshape(data, fsdp, tensor), MESH_AXES)


def partition_spec(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...] | None,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
) -> PartitionSpec:
    """Where one parameter lies on a mesh.

    Args:
      shape: of the parameter.
      axes: the logical name of each dimension; None for a replicated parameter.
      mesh: the device mesh.
      rules: logical name to mesh axis.

    Raises:
      UserError: if a logical name is not in the rules.
    """
    if axes is None:
        return PartitionSpec()
    entries: list[str | None] = []
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in rules:
            raise UserError(f"no sharding rule for logical axis {name!r}; rules: {sorted(rules)}")
        axis = None if name is None else rules[name]
        divides = axis in mesh.axis_names and size % mesh.shape[axis] == 0
        entries.append(axis if divides and axis not in entries else None)
    return PartitionSpec(*entries)


def shardings(state: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A tree like `state` with a `NamedSharding` in place of each parameter's value.

    Args:
      state: an nnx state (concrete or from `nnx.eval_shape`) whose variables carry `axes`.
      mesh: the device mesh.
      rules: logical name to mesh axis.
    """

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes")
        spec = partition_spec(variable.get_value().shape, axes, mesh, rules)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
