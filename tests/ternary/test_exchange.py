"""Signs that devices bring together: the same, whatever is split, and two bits each on the way."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flux_jax.partition import mesh_in_scope
from flux_jax.sharding import make_mesh, partition_spec
from ternary.exchange import gather_signs


@pytest.mark.parametrize(
    ("shape", "axes", "after"),
    [
        # Rows over tensor and fsdp; the inputs do not fill a block of the packed layout.
        ((16, 300), ("heads", "embed"), ("tensor", None)),
        ((16, 512), ("embed", "heads"), (None, "tensor")),
        # Rows that fsdp does not divide: the inputs are split.
        ((9, 512), ("heads", "embed"), (None, None)),
        ((9, 7), ("heads", "embed"), (None, None)),
    ],
)
def test_signs_come_together(shape, axes, after):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    signs = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    split = partition_spec(shape, axes, mesh)

    @jax.jit
    def together(signs):
        with mesh_in_scope(mesh):
            return gather_signs(signs, axes)

    placed = jax.device_put(signs, NamedSharding(mesh, split))
    found = together(placed)
    np.testing.assert_array_equal(found, signs)
    if "fsdp" in jax.tree.leaves(tuple(split)):
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*after)), 2)
        program = together.lower(placed).compile().as_text()
        gathers = [line for line in program.splitlines() if " all-gather(" in line]
        assert gathers
        assert all("= u8[" in line for line in gathers)


def test_without_a_mesh_nothing_happens():
    signs = jax.numpy.ones((4, 8), jax.numpy.int8)
    assert gather_signs(signs, ("heads", "embed")) is signs
