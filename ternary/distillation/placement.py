"""Where everything of a distillation lies on a mesh, and how it comes to be there.

Parameters go by the one table of `flux_jax.sharding`; what belongs to a parameter (its average, its
moments) lies where it does; the trajectories are split as a batch is. Nothing is ever whole on one
device: the student is made from the teacher by a program whose results are already split.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flux_jax.sharding import flat_shardings, partition_spec
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import Flat, split_flat
from ternary.config import DistillConfig, QuantConfig
from ternary.distillation.step import StepFunction, TrainState
from ternary.policy import Policy
from ternary.student import freeze_student, make_student

Module = TypeVar("Module", bound=nnx.Module)
# What the axis `data` is called where it splits nothing.
_ALIKE = "alike"


def abstract_student(
    teacher: FluxTransformer, quant: QuantConfig, policy: Policy, config: DistillConfig
) -> FluxTransformer:
    """The student of `make_student`, of shapes alone.

    Raises:
      UserError: a pattern of the policy that matches nothing.
    """
    return nnx.eval_shape(
        lambda module: make_student(module, quant, policy, master_dtype=config.master_dtype),
        teacher,
    )


def batch_split(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How an array (groups, batch, ...) is split."""
    axes = (None, "batch", *[None] * (len(shape) - 2))
    return NamedSharding(mesh, partition_spec(shape, axes, mesh))


def state_shardings(state: TrainState, student: FluxTransformer, mesh: Mesh) -> TrainState:
    """A `TrainState` with a sharding in place of every array.

    Args:
      state: arrays or shapes.
      student: of the same parameters; its axes are asked for.
      mesh: the devices.
    """
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    params = flat_shardings(student, mesh)

    def following(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = str(getattr(path[-1], "key", ""))
        # Adafactor's row and column sums are vectors, a few thousandths of the parameters.
        alike = name in params and leaf.shape == state.params[name].shape
        return params[name] if alike else everywhere

    return TrainState(
        params=params,
        ema={name: params[name] for name in state.ema},
        optimizer=jax.tree_util.tree_map_with_path(following, state.optimizer),
        pool=jax.tree.map(lambda leaf: batch_split(leaf.shape, mesh), state.pool),
        step=everywhere,
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that also say where they lie, for a restore."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings
    )


class Start:
    """The state before the first step, made where it will lie.

    Args:
      step: the training step.
      teacher: the teacher's transformer, on the mesh.
      student: of shapes alone.
      quant, policy: how the student is made of its teacher.
      seed: of the trajectories.
      mesh: the devices.

    Attributes:
      shapes: of the state.
      shardings: of the state.
    """

    def __init__(
        self,
        step: StepFunction,
        teacher: FluxTransformer,
        student: FluxTransformer,
        quant: QuantConfig,
        policy: Policy,
        *,
        seed: int,
        mesh: Mesh,
    ):
        rebuild, self._teacher = split_flat(teacher)
        master = step.config.master_dtype

        def from_teacher(flat: Flat) -> TrainState:
            made = make_student(rebuild(flat), quant, policy, master_dtype=master)
            return step.start(split_flat(made)[1], seed)

        self._from_teacher = from_teacher
        self._from_params = lambda params: step.start(params, seed)
        self.shapes: TrainState = jax.eval_shape(from_teacher, self._teacher)
        self.shardings = state_shardings(self.shapes, student, mesh)

    def from_teacher(self) -> TrainState:
        """With the teacher's weights as latent weights."""
        return jax.jit(self._from_teacher, out_shardings=self.shardings)(self._teacher)

    def from_params(self, params: Flat) -> TrainState:
        """With given latent weights."""
        return jax.jit(self._from_params, out_shardings=self.shardings)(params)

    def abstract(self) -> TrainState:
        """Shapes and places: what a restore needs."""
        return with_shardings(self.shapes, self.shardings)


def on_every_device(module: Module) -> Module:
    """The module on its devices, each of which draws all pictures, and has them whole at the end.

    A pipeline splits pictures over the mesh's axis `data`, and could not gather those that other
    processes drew. So that axis goes by another name here. No array is copied.
    """
    rebuild, flat = split_flat(module)
    return rebuild({name: _on_every_device(value) for name, value in flat.items()})


def _on_every_device(array: jax.Array) -> jax.Array:
    place = array.sharding
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return array

    def renamed(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(map(renamed, entry))
        return _ALIKE if entry == "data" else entry

    mesh = Mesh(place.mesh.devices, tuple(map(renamed, place.mesh.axis_names)))
    spec = PartitionSpec(*map(renamed, place.spec))
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(mesh, spec), parts)


class Freezer:
    """From parameters in training to the packed student, a copy on every device of the mesh.

    Packed, FLUX.1-dev is 3 GB. Whole on each device it can be drawn with like any other model.

    Args:
      step: the training step.
      params: shapes of the parameters.
      mesh: the devices.
    """

    def __init__(self, step: StepFunction, params: Flat, mesh: Mesh):
        def freeze(params: Flat) -> FluxTransformer:
            return freeze_student(step.student(params))

        frozen = nnx.eval_shape(freeze, params)
        self._rebuild, _ = split_flat(frozen)
        # Packed where the latent weights are, and only then copied: an eighth of the traffic.
        self._freeze = jax.jit(
            lambda params: split_flat(freeze(params))[1], out_shardings=flat_shardings(frozen, mesh)
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._copy = jax.jit(lambda packed: packed, out_shardings=everywhere)

    def __call__(self, params: Flat) -> FluxTransformer:
        """The frozen student."""
        return self._rebuild(self._copy(self._freeze(params)))
