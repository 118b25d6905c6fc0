"""From logical axes to the axes of a mesh, and meshes that cannot be."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec

from flux_jax.cli import common
from flux_jax.errors import UserError
from flux_jax.sharding import make_mesh, partition_spec, without_axis


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        # The first dimension is split by all that can; the second by what is left.
        ((8, 6), ("heads", "embed"), (("tensor", "fsdp"), None)),
        ((8, 6), ("embed", "heads"), ("fsdp", "tensor")),
        ((6, 6), ("heads", "embed"), ("tensor", "fsdp")),
        # What an axis does not divide is replicated.
        ((7, 6), ("heads", "embed"), (None, "fsdp")),
        ((8, 6), ("conv_out", None), (None, None)),
        # Several mesh axes for one dimension: those that together divide it.
        ((4, 3), ("batch", None), (("data", "fsdp"), None)),
        ((2, 3), ("batch", None), ("data", None)),
        ((3, 3), ("batch", None), (None, None)),
        ((9, 6), ("heads", "embed"), (None, "fsdp")),
        # A mesh axis is used once, by the first that names it.
        ((4, 6), ("mlp", "heads"), (("tensor", "fsdp"), None)),
        ((4, 6), ("batch", "embed"), (("data", "fsdp"), None)),
        ((4,), None, ()),
    ],
)
def test_partition_spec(shape, axes, expected):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert partition_spec(shape, axes, mesh) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (("fsdp", "tensor"), (None, "tensor")),
        ((("tensor", "fsdp"), None), ("tensor", None)),
        ((("data", "fsdp", "tensor"),), (("data", "tensor"),)),
        ((), ()),
    ],
)
def test_without_an_axis(spec, expected):
    assert without_axis(PartitionSpec(*spec), "fsdp") == PartitionSpec(*expected)


def test_an_unknown_axis_is_refused():
    with pytest.raises(UserError, match="no sharding rule for logical axis 'height'; rules: "):
        partition_spec((4,), ("height",), make_mesh())


@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_of_a_mesh(size):
    for axis in ("data", "fsdp", "sequence", "tensor"):
        with pytest.raises(UserError, match=f"mesh axis {axis} must be a whole number above 0"):
            make_mesh(**{axis: size})


def test_a_mesh_of_the_command_line_has_one_device_where_an_axis_is_left_out():
    """All that are left would draw one image several times."""
    found = common.mesh_of_this_process("sequence=4")
    assert dict(found.shape) == {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 1}
    assert common.mesh_of_this_process("data=2,sequence=2").size == 4
    assert common.mesh_of_this_process(None) is None


def test_a_mesh_needs_its_devices():
    with pytest.raises(UserError, match="a mesh of data=3 tensor=4 needs 12 devices, 8 are here"):
        make_mesh(data=3, tensor=4)
    assert dict(make_mesh(data=None, tensor=2).shape) == {
        "data": 4,
        "fsdp": 1,
        "sequence": 1,
        "tensor": 2,
    }
