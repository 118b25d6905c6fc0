"""The ternary product in plain JAX: what every kernel is compared with, and the way without one.

    p[m, n] = a[m] * sum over groups g of  s[n, g] * (sum over k in g of  x[m, k] * t[n, k])  + b[n]
    q[m, n] = p[m, n] + sum over r of  u[m, r] * v[n, r]
    y[m, n] = d[m, n] + f[m, n] * gelu(q[m, n])

t is -1, 0 or +1, s the weight's scale, a the activation's scale (1 for 16-bit activations), b the
bias, u and v a low-rank branch, f the gate (one for all rows, or one for each run of them), d the
residual; branch, GELU, gate and residual where they are asked for. With int8 activations the inner
sums are exact integers, the same on every backend and in any order. What follows is float32 in the
order above, groups from first to last, but for the branch's sum, whose order is the backend's; a
compiler may round a product and the sum that it goes into once instead of twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels.operands import Operands
from pallas_kernels.packing import GROUP, unpack_codes

Signed = Float[Array, "N K"] | Int8[Array, "N K"]
Activations = Float[Array, "*B K"] | Int8[Array, "*B K"]
Scale = Float[Array, ""] | Float[Array, " N"] | Float[Array, "N G"]

# Where 127 / largest is beyond this, a token is zero for any purpose; not far above, it overflows.
MAX_INVERSE = 3e38
# tanh GELU is y/2 (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3))), and 1 + tanh(u) = 2 sigmoid(2 u).
GELU_SLOPE, GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


class Quantized(NamedTuple):
    """Activations as int8, which any number of `ternary_matmul`s can take with 8 bits.

    Attributes:
      values: (..., K) in [-127, 127].
      scale: (...) float32; `values * scale` is about what was quantised.
      row_sum: (...), the sums of `values`.
    """

    values: Int8[Array, "*B K"]
    scale: Float[Array, "*B"]
    row_sum: Int32[Array, "*B"]


class Columns(NamedTuple):
    """`array[..., start : start + size]`, through GELU if `gelu`; what a kernel can read in place.

    Attributes:
      array: (..., W).
      start, size: W >= start + size.
      gelu: the tanh form, in float32.
    """

    array: Float[Array, "*B W"]
    start: int
    size: int
    gelu: bool = False

    def dense(self) -> Float[Array, "*B K"]:
        """The values, float32."""
        some = self.array[..., self.start : self.start + self.size].astype(jnp.float32)
        return tanh_gelu(some) if self.gelu else some


def quantize_activations(x: Float[Array, "*B K"]) -> Quantized:
    """Each token to int8 with its own scale: `q * scale` is about `x`.

    The largest magnitude of a token becomes 127; halves go to even. A token of zeros has scale 0, a
    token that is not finite a scale that is not finite.

    Args:
      x: (..., K).
    """
    x32 = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x32), axis=-1, keepdims=True)
    # On a CPU, XLA's maximum passes over NaN where it is vectorised (openxla/xla#21461).
    largest = jnp.where(jnp.isnan(x32).any(axis=-1, keepdims=True), jnp.nan, largest)
    inverse = jnp.where(largest > 0, 127.0 / jnp.where(largest > 0, largest, 1.0), 0.0)
    inverse = jnp.where(inverse > MAX_INVERSE, 0.0, inverse)
    q = jnp.clip(jnp.round(x32 * inverse), -127, 127).astype(jnp.int8)
    sums = q.sum(-1, dtype=jnp.int32)
    return Quantized(q, largest[..., 0] * jnp.float32(1 / 127), sums)


def quantize_columns(parts: Sequence[Columns]) -> Quantized:
    """`pallas_kernels.quantize_columns`, from checked arguments."""
    return quantize_activations(jnp.concatenate([part.dense() for part in parts], axis=-1))


def normalize_and_quantize(
    x: Float[Array, "M K"],
    gain: Float[Array, "B K"] | None,
    shift: Float[Array, "B K"] | None,
    eps: float,
) -> Quantized:
    """`pallas_kernels.normalize_and_quantize`, from checked arguments and x (M, K)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if gain is not None:
        y = y * (per_row(gain, x.shape[0]) + 1.0)
    if shift is not None:
        y = y + per_row(shift, x.shape[0])
    return quantize_activations(y)


def per_row(vectors: Float[Array, "B N"], rows: int) -> Float[Array, "M N"]:
    """A vector for each of `rows`, float32: rows in B equal runs, the first takes the first."""
    batch, width = vectors.shape
    wide = vectors.astype(jnp.float32)[:, None]
    # No vectors at all go with no rows at all.
    run = rows // max(batch, 1)
    return jnp.broadcast_to(wide, (batch, run, width)).reshape(rows, width)


def tanh_gelu(y: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """GELU in its tanh form, as y times a sigmoid, which loses nothing where y is negative."""
    return y * jax.nn.sigmoid((y + y * y * y * GELU_CUBIC) * GELU_SLOPE)


def signed_product(
    x: Activations,
    signs: Signed,
    scale: Scale,
    bias: Float[Array, " N"] | None = None,
    token_scale: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B N"]:
    """The formula of this module's text, from unpacked weights.

    Args:
      x: (..., K); int8, or floating.
      signs: (N, K), each -1, 0 or +1, of x's dtype.
      scale: of the weight: per tensor (), per output (N,), or per group of 128 inputs (N, G).
      bias: (N,).
      token_scale: (...), of int8 activations.

    Returns:
      (..., N) float32.
    """
    scale, outputs = scale.astype(jnp.float32), (*[1] * (x.ndim - 1), -1)
    if scale.ndim < 2:
        # Leading axes stay apart, see `float_product`.
        y = _product(x, signs) * scale.reshape(outputs)
    else:
        y = _grouped(x.reshape(-1, x.shape[-1]), signs, scale).reshape(*x.shape[:-1], len(signs))
    if token_scale is not None:
        y = y * token_scale.astype(jnp.float32)[..., None]
    return y if bias is None else y + bias.astype(jnp.float32).reshape(outputs)


def _product(x: Array, signs: Array) -> Array:
    """`x @ signs.T`, in int32 or float32, as float32."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return _contract(x, signs, [x.ndim - 1], [1], jnp.int32).astype(jnp.float32)
    return float_product(x, signs)


def _contract(a: Array, b: Array, of_a: Sequence[int], of_b: Sequence[int], kind: Any) -> Array:
    """The product of two arrays over some axes of each, summed in `kind`."""
    over = (tuple(of_a), tuple(of_b))
    return jax.lax.dot_general(a, b, (over, ((), ())), preferred_element_type=kind)


@jax.custom_vjp
def float_product(x: Float[Array, "*B K"], weight: Float[Array, "N K"]) -> Float[Array, "*B N"]:
    """`x @ weight.T` of two arrays of one dtype, in float32.

    Leading axes stay apart: merged, those that a compiler splits over devices would be gathered.

    In the gradient's two products too, both factors are of that dtype, and so are their results:
    what comes back in float32 is rounded to it first (but not to float16, whose range is too
    small). Left to JAX, x and the weight would be widened instead, and the tensor cores run at
    half of bf16's rate or less.
    """
    return _contract(x, weight, [x.ndim - 1], [1], jnp.float32)


def _float_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return float_product(x, weight), (x, weight)


def _float_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, weight = saved
    # What is small in float32 is nothing in float16.
    too_small = jnp.finfo(x.dtype).minexp > jnp.finfo(jnp.float32).minexp
    kind = jnp.float32 if too_small else x.dtype
    a, b, g = (array.astype(kind) for array in (x, weight, grad))

    def product(a: Array, b: Array) -> Array:
        return _contract(a, b, [a.ndim - 1], [1], kind)

    # By JAX's rules: they know what is to be summed over devices, and where results belong.
    (of_x,) = jax.linear_transpose(lambda a: product(a, b), a)(g)
    (of_weight,) = jax.linear_transpose(lambda b: product(a, b), b)(g)
    return of_x.astype(x.dtype), of_weight.astype(weight.dtype)


float_product.defvjp(_float_forward, _float_backward)


def _grouped(x: Array, signs: Array, scale: Array) -> Array:
    """Group by group, so that no (M, N, G) array is ever there."""
    groups = scale.shape[1]
    fill = ((0, 0), (0, groups * GROUP - x.shape[1]))
    x_parts, signs_parts = (
        jnp.pad(a, fill).reshape(a.shape[0], groups, GROUP).swapaxes(0, 1) for a in (x, signs)
    )

    def scaled(part: tuple[Array, Array, Array]) -> Array:
        x_part, signs_part, scale_part = part
        return _product(x_part, signs_part) * scale_part.reshape((1, -1))

    # From the first group on, not from zeros: under `shard_map` these would be of another type.
    parts = (x_parts, signs_parts, scale.T)
    first, rest = (jax.tree.map(lambda part, of=of: part[of], parts) for of in (0, slice(1, None)))
    return jax.lax.scan(lambda y, part: (y + scaled(part), None), scaled(first), rest)[0]


def ternary_matmul(
    x: Float[Array, "M K"] | Int8[Array, "M K"],
    packed: UInt8[Array, "N Kp"],
    operands: Operands,
    *,
    activation_bits: int,
    gelu: bool = False,
) -> Float[Array, "M N"]:
    """`pallas_kernels.ternary_matmul` before its last rounding, from checked arguments: float32."""
    codes, token_scale = unpack_codes(packed, x.shape[-1]), operands.token_scale
    if activation_bits == 8 and token_scale is None:
        x, token_scale, _ = quantize_activations(x)
    signs = codes.astype(x.dtype) - 1
    y = signed_product(x, signs, operands.scale, operands.bias, token_scale)
    return finished(y, operands, gelu=gelu)


def finished(
    y: Float[Array, "M N"], operands: Operands, *, gelu: bool = False
) -> Float[Array, "M N"]:
    """`residual + gate * gelu(y + u @ v.T)` in float32, with what is given of these."""
    if operands.u is not None:
        y = y + float_product(operands.u, operands.v)
    return add_gated(tanh_gelu(y) if gelu else y, operands.gate, operands.residual)


def add_gated(
    y: Float[Array, "M N"],
    gate: Float[Array, "B N"] | None,
    residual: Float[Array, "M N"] | None,
) -> Float[Array, "M N"]:
    """`residual + gate * y` in float32, with what is given; a gate for each of B equal runs."""
    if gate is not None:
        y = y * per_row(gate, y.shape[0])
    if residual is not None:
        y = residual.astype(jnp.float32) + y
    return y
