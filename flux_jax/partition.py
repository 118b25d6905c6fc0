"""What the compiler is told of a mesh while a function is traced for it.

Inside `mesh_in_scope` XLA splits what is computed over the devices. Left to itself it chooses well
for most operations; here it is told where activations lie (`constrain`), which factor of a product
moves (`product_on_mesh`), and what each device computes alone (`on_each_device`). Outside, all of
it does nothing. Which axis splits what is the table of `flux_jax.sharding`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Shaped

from flux_jax.sharding import partition_spec, without_axis


@contextlib.contextmanager
def mesh_in_scope(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """While a function is traced: the mesh over which the compiler splits what it computes.

    `constrain`, `product_on_mesh`, `on_each_device` and `ternary.exchange` act on it. What is given
    to the function must lie on the mesh. None changes nothing.
    """
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def compiler_mesh(x: Any) -> AbstractMesh | None:
    """The mesh of `mesh_in_scope`, where the compiler is to split the work over it.

    Args:
      x: what the work is on. If it is not traced, there is no compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Under `pmap` and `shard_map` an axis is the caller's, and an array already a part.
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh if isinstance(x, Tracer) else None


def constrain(x: Shaped[Array, "*shape"], axes: tuple[str | None, ...]) -> Shaped[Array, "*shape"]:
    """Tell the compiler where an activation lies; without `mesh_in_scope`, x as it is.

    Args:
      x: an activation.
      axes: the logical name of each dimension, as in `DEFAULT_RULES`.
    """
    mesh = compiler_mesh(x)
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))


def is_gathered(x: Shaped[Array, "*B K"]) -> bool:
    """Whether a product with `x` all-gathers the weight over `fsdp`.

    For (B, L, K) tokens it is. (B, K) vectors, one for each example, are less to move than a
    weight, and each device computes some outputs of all of them.
    """
    return x.ndim > 2


def product_on_mesh(
    product: Callable[[Array, Array], Array],
    x: Shaped[Array, "*B K"],
    weight: Shaped[Array, "N K"],
    axes: tuple[str | None, ...],
) -> Shaped[Array, "*B _"]:
    """`product(x, weight)` where the two are to meet (`is_gathered`); without a mesh, that alone.

    Args:
      product: of x and the weight's rows, whichever are there.
      x: tokens or vectors.
      weight: a parameter, or what was made of it.
      axes: the logical names of the weight's dimensions.
    """
    mesh = compiler_mesh(x)
    if mesh is None or x.ndim < 2:
        return product(x, weight)
    place = partition_spec(weight.shape, axes, mesh)
    if is_gathered(x):
        return product(x, _gathered(weight, place))
    at = jax.lax.with_sharding_constraint
    examples = partition_spec(x.shape, ("batch", None), mesh)
    batch = without_axis(examples, "fsdp")
    y = product(at(x, batch), at(weight, place))
    # Both act on the gradient that comes back, too. Cut into vectors of the model's width, some
    # outputs of each would be a split that the compiler cannot go on from.
    return at(at(y, PartitionSpec(batch[0], place[0])), PartitionSpec(examples[0], None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: Array, place: PartitionSpec) -> Array:
    """A weight that lies at `place`, all-gathered over `fsdp`.

    Its gradient is reduced to where the weight lies. A sharding constraint's own gradient would
    have the constraint's sharding: whole, so that over `data` and `fsdp` whole gradients would be
    exchanged.
    """
    return jax.lax.with_sharding_constraint(weight, without_axis(place, "fsdp"))


def _gathered_forward(weight: Array, place: PartitionSpec) -> tuple[Array, None]:
    return _gathered(weight, place), None


def _gathered_backward(place: PartitionSpec, _: None, grad: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(grad, place),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def on_each_device(
    function: Callable[..., Array], axes: tuple[str | None, ...], *arrays: Array
) -> Array:
    """`function(*arrays)`, each device for its own part, without a word to the others.

    For what the compiler cannot split by itself, or only by asking Python, as it does for cuDNN's
    attention: such a program is new to the compilation cache in every process. Without
    `mesh_in_scope`, the function alone.

    Args:
      function: of arrays of the same sizes where `axes` has a name; its result has them too.
      axes: the logical name of each dimension of the arrays and of the result.
      arrays: what it takes.
    """
    mesh = compiler_mesh(arrays[0])
    if mesh is None:
        return function(*arrays)
    spec = partition_spec(arrays[0].shape, axes, mesh)
    split = jax.shard_map(
        function, mesh=mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
    )
    return split(*arrays)
