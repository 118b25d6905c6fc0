"""The student: a transformer some of whose linears are ternary, from its dense teacher."""

from __future__ import annotations

from flax import nnx

from flux_jax.layers import DType
from flux_jax.linears import linears, replace_linears
from flux_jax.transformer import FluxTransformer
from ternary.config import QuantConfig
from ternary.layers import FakeTernaryLinear
from ternary.policy import Policy, select


def make_student(
    teacher: FluxTransformer,
    quant: QuantConfig,
    policy: Policy,
    *,
    master_dtype: DType = "float32",
) -> FluxTransformer:
    """A copy of the teacher whose linears are fake-ternary where the policy says so.

    Args:
      teacher: left as it is; what is not replaced is shared with it.
      quant: what a ternary layer looks like.
      policy: which linears.
      master_dtype: of the latent weights and all else that a fake-ternary layer trains.

    Raises:
      UserError: a pattern of the policy that matches nothing.
    """
    graphdef, state = nnx.split(teacher)
    student = nnx.merge(graphdef, state)
    names = select(list(linears(student)), policy)
    replace_linears(
        student,
        names,
        lambda _, linear: FakeTernaryLinear.from_linear(linear, quant, master_dtype=master_dtype),
    )
    return student


def freeze_student(student: FluxTransformer) -> FluxTransformer:
    """A copy of the student with packed weights: what its checkpoint will load as."""
    graphdef, state = nnx.split(student)
    frozen = nnx.merge(graphdef, state)
    replace_linears(
        frozen, list(linears(student, FakeTernaryLinear)), lambda _, layer: layer.freeze()
    )
    return frozen
