"""The student: a transformer some of whose linears are ternary, from its dense teacher."""

from __future__ import annotations

from typing import TypeVar

from flax import nnx

from flux_jax.errors import UserError
from flux_jax.layers import DType, Linear
from flux_jax.linears import linears, replace_linears
from flux_jax.lora import check_no_lora
from ternary.config import QuantConfig
from ternary.layers import FakeTernaryLinear, TernaryLinear
from ternary.policy import Policy, select

Model = TypeVar("Model", bound=nnx.Module)


def make_student(
    teacher: Model,
    quant: QuantConfig,
    policy: Policy,
    *,
    master_dtype: DType = "float32",
) -> Model:
    """A copy of the teacher whose linears are fake-ternary where the policy says so.

    Args:
      teacher: a `FluxTransformer`, or any module with linears of ours or of Flax. It stays as it
        is, also when the student is trained; what is not replaced is shared until then.
      quant: what a ternary layer looks like.
      policy: which linears.
      master_dtype: of the latent weights and all else that a fake-ternary layer trains.

    Raises:
      UserError: a pattern of the policy that matches nothing, or a teacher that is ternary already
        or has LoRAs beside its weights, for which a checkpoint of the student has no place.
    """
    check_no_lora(teacher)
    if packed := linears(teacher, TernaryLinear):
        raise UserError(f"expected a dense teacher, got one with {len(packed)} ternary linears")
    student = _copy(teacher)
    names = select(list(linears(student, (Linear, nnx.Linear))), policy)
    replace_linears(
        student,
        names,
        lambda _, linear: FakeTernaryLinear.from_linear(linear, quant, master_dtype=master_dtype),
    )
    return student


def freeze_student(student: Model) -> Model:
    """A copy of the student with packed weights: what its checkpoint will load as."""
    frozen = _copy(student)
    replace_linears(
        frozen, list(linears(student, FakeTernaryLinear)), lambda _, layer: layer.freeze()
    )
    return frozen


def _copy(model: Model) -> Model:
    """Variables of its own, for updates in place, which hold the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)
