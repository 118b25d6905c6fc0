"""What devices that share a weight by `fsdp` send each other of it: codes of two bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Int8

from flux_jax.layers import Axes
from flux_jax.partition import compiler_mesh
from flux_jax.sharding import axis_size, partition_spec, without_axis
from pallas_kernels import pack_codes, unpack_codes


def gather_signs(signs: Int8[jax.Array, "N K"], axes: Axes) -> Int8[jax.Array, "N K"]:
    """Signs brought together over `fsdp`, packed on the way; without `mesh_in_scope`, as they are.

    Args:
      signs: -1, 0 or +1.
      axes: the logical names of the dimensions.
    """
    mesh = compiler_mesh(signs)
    if mesh is None or axis_size(mesh, "fsdp") == 1:
        return signs
    split = partition_spec(signs.shape, axes, mesh)
    whole = without_axis(split, "fsdp")
    if whole == split:
        return signs
    rows_are_split = whole[0] != split[0]

    def exchange(part: Int8[jax.Array, "n k"]) -> Int8[jax.Array, "_ _"]:
        rows, columns = part.shape
        packed = pack_codes((part + 1).astype(jnp.uint8))
        parts = jax.lax.all_gather(packed, "fsdp")
        codes = unpack_codes(parts.reshape(-1, parts.shape[-1]), columns)
        found = codes.astype(jnp.int8) - 1
        if rows_are_split:
            return found
        return found.reshape(-1, rows, columns).swapaxes(0, 1).reshape(rows, -1)

    # The compiler would gather signs and pack afterwards, if it were left to it.
    together = jax.shard_map(exchange, mesh=mesh, in_specs=split, out_specs=whole, check_vma=False)
    return together(signs)
