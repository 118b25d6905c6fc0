"""`ternary_matmul`: a product with packed ternary weights, on the backend that is asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels import reference
from pallas_kernels.packing import GROUP, group_count, packed_width
from pallas_kernels.reference import Scale

BACKENDS = ("jax",)
ACTIVATION_BITS = (8, 16)


def quantize_activations(x: Float[Array, "*B K"]) -> tuple[Int8[Array, "*B K"], Float[Array, "*B"]]:
    """Each token to int8 with its own scale; see `reference.quantize_activations`."""
    return reference.quantize_activations(x)


def ternary_matmul(
    x: Float[Array, "*B K"],
    packed: UInt8[Array, "N Kp"],
    scale: Scale,
    bias: Float[Array, " N"] | None = None,
    *,
    activation_bits: int = 16,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Float[Array, "*B N"]:
    """`x @ (scale * weight).T + bias` for a packed ternary weight.

    Differentiable in x, scale and bias. The gradient is that of the product with 16-bit
    activations: the rounding to int8 counts as the identity.

    Args:
      x: (..., K), floating; at least one axis.
      packed: (N, Kp) in the layout of `pallas_kernels.packing`.
      scale: of the weight: per tensor (), per output (N,), or per group of 128 inputs
        (N, ceil(K / 128)).
      bias: (N,) or None.
      activation_bits: 16 multiplies x as it is; 8 quantises each token to int8 first and sums in
        int32, exactly.
      out_dtype: of the result; x's by default. Rounded once, from float32.
      backend: one of `BACKENDS`; None chooses.

    Returns:
      (..., N).

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown backend.
    """
    check_arguments(x, packed, scale, bias, activation_bits, backend)
    y = _PRODUCTS[activation_bits](x, packed, scale, bias)
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def _differentiable(activation_bits: int) -> Any:
    """The product for one activation width, with its gradient."""

    @jax.custom_vjp
    def product(x: Any, packed: Any, scale: Any, bias: Any) -> Any:
        return reference.ternary_matmul(x, packed, scale, bias, activation_bits)

    def forward(x: Any, packed: Any, scale: Any, bias: Any) -> tuple[Any, Any]:
        return product(x, packed, scale, bias), (x, packed, scale, bias)

    def backward(saved: Any, grad: Any) -> tuple[Any, None, Any, Any]:
        x, packed, scale, bias = saved

        def straight_through(x: Any, scale: Any, bias: Any) -> Any:
            return reference.ternary_matmul(x, packed, scale, bias, 16)

        dx, dscale, dbias = jax.vjp(straight_through, x, scale, bias)[1](grad)
        return dx, None, dscale, dbias

    product.defvjp(forward, backward)
    return product


_PRODUCTS = {bits: _differentiable(bits) for bits in ACTIVATION_BITS}


def check_arguments(
    x: Any, packed: Any, scale: Any, bias: Any, activation_bits: int, backend: str | None
) -> None:
    """Refuse what no backend could compute.

    Raises:
      ValueError: naming the argument, what was expected and what was found.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits!r}")
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating with at least one axis, got {x.dtype} of shape {x.shape}"
        )
    if packed.ndim != 2 or packed.dtype != jnp.uint8:
        raise ValueError(
            f"packed must be uint8 (N, Kp), got {packed.dtype} of shape {packed.shape}"
        )
    columns, rows = x.shape[-1], packed.shape[0]
    if packed.shape[1] != packed_width(columns):
        raise ValueError(
            f"packed must have {packed_width(columns)} bytes a row for the {columns} inputs of x, "
            f"got {packed.shape[1]}"
        )
    grouped = (rows, group_count(columns))
    if scale.shape not in ((), (rows,), grouped):
        raise ValueError(
            f"scale must have shape () or ({rows},) or {grouped} (groups of {GROUP} inputs), got "
            f"{scale.shape}"
        )
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"scale must be floating, got {scale.dtype}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must have shape ({rows},), got {bias.shape}")
