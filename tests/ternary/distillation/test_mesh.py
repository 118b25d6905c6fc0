"""Distillation over data, fsdp and tensor: the results of one device, from a part of its memory."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.linears import linears
from flux_jax.sharding import MeshConfig, flat_shardings, make_mesh, read_mesh
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat, to_flat
from pallas_kernels import packed_width
from ternary.config import DistillConfig, QuantConfig, TrajectoryConfig
from ternary.distillation.placement import Freezer, Start, abstract_student
from ternary.distillation.run import distill
from ternary.distillation.run_config import RunConfig
from ternary.distillation.step import PromptSet, StepFunction
from ternary.distillation.task import Task
from ternary.distillation.training_state import StateStore
from ternary.distillation.trajectory import Trajectories
from ternary.layers import FakeTernaryLinear
from ternary.policy import Policy

FLUX = FluxConfig(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=16,
    hidden_size=64,
    num_heads=4,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)
CONFIG = DistillConfig(
    steps=60,
    learning_rate=1e-3,
    warmup=2,
    compute_dtype="float32",
    remat=True,
    accumulate=2,
    ema=0.9,
)
# A few layers of every kind of place: each one costs compile time.
POLICY = Policy(include=("*img_attn*", "single_blocks.*"))
STEPS = 5
QUANTS = {
    "channel": QuantConfig(),
    "tensor": QuantConfig(granularity="tensor"),
    "int8": QuantConfig(granularity="tensor", activation_bits=8),
    "group128": QuantConfig(granularity="group128", learned_scale=True, rank=2, refit_steps=1),
}


class Training:
    """Everything on one mesh, ready to take steps."""

    def __init__(self, axes, kind):
        data, fsdp, tensor = axes
        self.mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        dense = FluxTransformer(FLUX, dtype=jnp.float32, rngs=nnx.Rngs(0))
        rebuild, flat = split_flat(dense)
        teacher = rebuild(jax.device_put(flat, flat_shardings(dense, self.mesh)))
        self.student = student = abstract_student(teacher, QUANTS[kind], POLICY, CONFIG)
        trajectories = Trajectories(
            TrajectoryConfig(sampling_steps=(4, 6), groups=2),
            SchedulerConfig(),
            tokens=(4, FLUX.in_channels),
            batch_size=8,
            prompts=5,
        )
        rng = np.random.default_rng(0)
        prompts = PromptSet(
            txt=jnp.asarray(rng.standard_normal((5, 3, FLUX.context_in_dim), np.float32)),
            pooled=jnp.asarray(rng.standard_normal((5, FLUX.vec_in_dim), np.float32)),
        )
        self.step = StepFunction(teacher, student, CONFIG, trajectories, mesh=self.mesh)
        self.start = Start(
            self.step, teacher, student, QUANTS[kind], POLICY, seed=0, mesh=self.mesh
        )
        self.inputs = (split_flat(teacher)[1], jax.device_put(prompts, everywhere))
        program = jax.jit(self.step, out_shardings=(self.start.shardings, everywhere))
        shapes = (self.start.abstract(), *self.inputs)
        self.compiled = program.lower(*shapes).compile()

    def run(self, state, count):
        losses, norms = [], []
        for _ in range(count):
            state, metrics = self.compiled(state, *self.inputs)
            losses.append(float(metrics.loss))
            norms.append(float(metrics.grad_norm))
        return state, np.array(losses), np.array(norms)


# Tests share the compiled steps.
training = functools.cache(Training)


@functools.cache
def from_the_start(axes, kind):
    here = training(axes, kind)
    return here.run(here.start.from_teacher(), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        # As with pmap and on a mesh in test_distill.
        pytest.param((8, 1, 1), "channel", marks=pytest.mark.long),
        ((1, 8, 1), "channel"),
        ((1, 1, 4), "channel"),
        ((2, 2, 2), "channel"),
        pytest.param((2, 2, 2), "tensor", marks=pytest.mark.long),
        pytest.param((2, 2, 2), "int8", marks=pytest.mark.long),
        pytest.param((2, 2, 2), "group128", marks=pytest.mark.long),
    ],
)
def test_every_mesh_gives_the_losses_and_gradients_of_one_device(axes, kind):
    state, losses, norms = from_the_start(axes, kind)
    alone, expected, expected_norms = from_the_start((1, 1, 1), kind)
    # Sums in another order move an activation over the edge between two int8 codes now and then; in
    # which step depends on how wide the processor's vectors are.
    close = 1e-3 if kind == "int8" else 1e-5
    np.testing.assert_allclose(losses, expected, rtol=close)
    np.testing.assert_allclose(norms, expected_norms, rtol=close)
    if kind == "channel":
        for name, value in state.params.items():
            # Adam divides by the gradient's size: where that is rounding alone, so is the update.
            off = np.abs(np.asarray(value) - np.asarray(alone.params[name]))
            assert np.quantile(off, 0.99) < 1e-5, name


@pytest.mark.slow
def test_fsdp_splits_parameters_and_optimizer():
    """Eight devices hold an eighth each, and take in and give out no more."""
    parts, whole = training((1, 8, 1), "channel"), training((1, 1, 1), "channel")
    state = parts.start.from_teacher()
    for tree in (state.params, state.ema, state.optimizer):
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        assert held < 0.15 * sum(x.nbytes for x in jax.tree.leaves(tree))
    sizes = [t.compiled.memory_analysis() for t in (parts, whole)]
    assert sizes[0].argument_size_in_bytes < 0.15 * sizes[1].argument_size_in_bytes
    assert sizes[0].output_size_in_bytes < 0.15 * sizes[1].output_size_in_bytes
    # Moments go in and come out as they lie: whole, one would be an operand or result somewhere.
    name = "single_blocks.0.linear1.weight"
    rows, columns = state.params[name].shape
    local = f"f32[{rows // 8},{columns}]"
    assert local in parts.compiled.as_text()


def gathered_elements(program: str) -> Counter[str]:
    """Elements that a device receives from others, by type, once for every place in the program."""
    found: Counter[str] = Counter()
    for line in program.splitlines():
        results, _, _ = line.partition(" all-gather(")
        if results != line:
            for kind, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", results):
                found[kind] += math.prod(map(int, shape.split(",")))
    return found


@pytest.mark.slow
def test_fsdp_gathers_packed_codes_in_place_of_latent_weights():
    here = training((1, 8, 1), "channel")
    student, teacher = here.start.shapes.params, here.inputs[0]
    whole = sum(value.size for value in teacher.values())
    names = linears(here.student, FakeTernaryLinear)
    latent = sum(student[f"{name}.weight"].size for name in names)
    vectors = [name for name in names if "mod" in name]
    shapes = [student[f"{name}.weight"].shape for name in names if name not in vectors]
    moved = sum(student[f"{name}.weight"].size for name in vectors)
    found = gathered_elements(here.compiled.as_text())
    # Codes of what is ternary, four a byte, and the rest as it is: forward, and where it is
    # recomputed. What is multiplied by one vector an example stays where it is, the teacher's too.
    assert found["u8"] == 2 * sum(rows * packed_width(columns) for rows, columns in shapes)
    assert found["s8"] == 0
    assert moved > 0
    # Nor are the moments among it, which only the optimiser reads: two for every parameter.
    others = whole - moved + 2 * (whole - latent) + 0.5 * (latent - moved)
    assert found["f32"] < others < found["f32"] + 2 * whole


def losses_over(meshes, folder):
    """One step's losses on each mesh, from the checkpoint of the one before."""
    state, found = None, []
    store = StateStore(folder / "checkpoints", keep=1)
    for number, axes in enumerate(meshes):
        here = training(axes, "channel")
        like = here.start.abstract()
        state = here.start.from_teacher() if number == 0 else store.restore(like)
        places = jax.tree.map(lambda x: x.sharding, (state, like))
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *places))
        state, losses, _ = here.run(state, 1)
        found.append(losses)
        store.save(number, state)
        store.wait()
    store.close()
    return np.concatenate(found)


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_meshes(tmp_path):
    """8 devices, then 4, then 1, then 8: the losses of one device throughout."""
    _, expected, _ = from_the_start((1, 1, 1), "channel")
    found = losses_over([(2, 2, 2), (1, 1, 4), (1, 1, 1), (1, 8, 1)], tmp_path)
    np.testing.assert_allclose(found, expected[:4], rtol=1e-5)


@pytest.mark.gpu
def test_a_checkpoint_goes_on_on_fewer_gpus(tmp_path):
    """As many GPUs as there are, then 2, then 1."""
    sizes = [size for size in (8, 4, 2, 1) if size <= jax.device_count()]
    if len(sizes) == 1:
        pytest.skip("needs two GPUs")
    # Not in the tensor cores' short float32.
    with jax.default_matmul_precision("highest"):
        _, expected, _ = from_the_start((1, 1, 1), "channel")
        found = losses_over([(1, size, 1) for size in sizes], tmp_path)
    np.testing.assert_allclose(found, expected[: len(sizes)], rtol=1e-4)


@pytest.mark.slow
def test_a_student_is_packed_where_it_lies_and_the_same_everywhere():
    packed = []
    for axes in ((1, 1, 1), (2, 2, 2)):
        here = training(axes, "channel")
        params = here.start.from_teacher().params
        packed.append(to_flat(Freezer(here.step, here.start.shapes.params, here.mesh)(params)))
    for name, value in packed[0].items():
        assert packed[1][name].is_fully_replicated
        if name.endswith("packed"):
            np.testing.assert_array_equal(packed[1][name], value)


def test_a_dimension_that_does_not_divide_stays_whole():
    layer = nnx.eval_shape(lambda: FluxTransformer(FLUX, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    places = flat_shardings(layer, make_mesh(fsdp=2, tensor=3))
    assert places["single_blocks.0.linear2.weight"].spec == PartitionSpec("fsdp", None)
    assert places["single_blocks.0.linear1.weight"].spec == PartitionSpec("fsdp", None)
    assert places["single_blocks.0.linear1.bias"].spec == PartitionSpec(None)
    assert places["img_in.weight"].spec == PartitionSpec("fsdp", None)


def test_a_distillation_has_no_sequence_axis(tmp_path):
    task = Task(teacher="tiny", prompts=tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="no mesh axis sequence: use data, fsdp and tensor"):
        distill(task, tmp_path / "out", RunConfig(mesh=MeshConfig(sequence=2)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["data", "rows=2", "data=2,data=2", "data=two", "", "data=4;fsdp=2"]
)
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match="a mesh is written AXIS=SIZE"):
        read_mesh(text)


def test_meshes_are_read_and_made():
    assert read_mesh("data=4, fsdp=2") == MeshConfig(data=4, fsdp=2)
    # What is left over goes to data.
    assert dict(read_mesh("fsdp=2").make().shape) == {
        "data": 4,
        "fsdp": 2,
        "sequence": 1,
        "tensor": 1,
    }
    with pytest.raises(UserError, match="a mesh of data=4 fsdp=4 needs 16 devices, 8 are here"):
        make_mesh(data=4, fsdp=4)
    with pytest.raises(UserError, match="mesh axis fsdp must be a whole number above 0, got 0"):
        MeshConfig(fsdp=0)
