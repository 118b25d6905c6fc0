"""A product with a packed weight and what a block has around it, in as few passes as pay.

With int8 activations: one pass over memory makes them (layer norm, modulation and rounding; or
GELU, concatenation and rounding), and the product's epilogue adds the gated result to the residual
stream. With 16-bit activations XLA makes them, and GELU, gate and residual are in the epilogue. A
low-rank branch takes 16-bit activations, beside int8 ones too.

GELU before int8 is not in the epilogue of the product before, though the kernels could: there the
tensor cores wait for it, while the pass that rounds waits for memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, UInt8

from flux_jax.inputs import EPS, Branch, Hidden, Input, Joined, Modulated, dense
from pallas_kernels import (
    Columns,
    Quantized,
    normalize_and_quantize,
    quantize_activations,
    quantize_columns,
    ternary_matmul,
)
from pallas_kernels.transforms import differentiable
from ternary.quantize import Scale


class Weights(NamedTuple):
    """A linear's parameters, as `pallas_kernels.ternary_matmul` takes them."""

    packed: UInt8[Array, "N Kp"]
    scale: Scale
    bias: Float[Array, " N"] | None


def product(
    x: Input,
    weights: Weights,
    gate: Float[Array, "B N"] | None,
    residual: Float[Array, "*L N"] | None,
    branch: Branch | None = None,
    *,
    activation_bits: int,
    dtype: Any,
    backend: str | None,
    gelu: bool = False,
    leave: int = 0,
) -> Float[Array, "*L N"]:
    """`residual + gate * gelu(x @ weight.T + bias + branch)`, with what is asked for, in `dtype`.

    Differentiable in everything floating. The gradient is that of 16-bit activations: the rounding
    to int8 counts as the identity.

    Args:
      x: the activations, or a statement of them.
      weights: of the linear.
      gate: one vector for each of the first axis of x; with `residual`.
      residual: the stream that the result is added to.
      branch: low-rank, of `dtype`; with int8 activations too its products are in 16 bits.
      activation_bits: 8 or 16.
      dtype: of 16-bit activations and of the result.
      backend: of `pallas_kernels`.
      gelu: the tanh form.
      leave: multiprocessors that are left to what runs beside it.
    """
    settings: dict[str, Any] = {
        "out_dtype": dtype,
        "backend": backend,
        "gelu": gelu,
        "leave": leave,
    }
    # What is None is part of the structure: an operand of the gradient's rule must be an array.
    arrays, structure = jax.tree.flatten((x, weights, gate, residual, branch))

    def low_rank(x: Input, branch: Branch | None) -> Any:
        return None if branch is None else (branch.narrow(x), branch.b)

    def sixteen(*arrays: Any) -> Any:
        x, weights, gate, residual, branch = jax.tree.unflatten(structure, arrays)
        x = dense(x).astype(dtype)
        others = {"gate": gate, "residual": residual, "low_rank": low_rank(x, branch)}
        return ternary_matmul(x, *weights, **others, **settings)

    def eight(*arrays: Any) -> Any:
        x, weights, gate, residual, branch = jax.tree.unflatten(structure, arrays)
        rows = quantized(x, backend)
        return ternary_matmul(
            rows.values,
            *weights,
            activation_bits=8,
            token_scale=rows.scale,
            row_sum=rows.row_sum,
            gate=gate,
            residual=residual,
            low_rank=low_rank(x, branch),
            **settings,
        )

    if activation_bits == 16:
        return sixteen(*arrays)
    return differentiable(eight, sixteen)(*arrays)


def quantized(x: Input, backend: str | None) -> Quantized:
    """The activations as int8, in one pass over whatever they are made of."""
    if isinstance(x, Modulated):
        return normalize_and_quantize(x.x, x.scale, x.shift, eps=EPS, backend=backend)
    if isinstance(x, Hidden):
        return quantize_columns([_columns(x)], backend=backend)
    if isinstance(x, Joined):
        first = Columns(x.first, 0, x.first.shape[-1])
        return quantize_columns([first, _columns(x.hidden)], backend=backend)
    return quantize_activations(x, backend=backend)


def _columns(hidden: Hidden) -> Columns:
    size = hidden.array.shape[-1] - hidden.start
    return Columns(hidden.array, hidden.start, size, gelu=not hidden.activated)
