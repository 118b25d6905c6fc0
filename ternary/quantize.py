"""The ternary quantiser: `w` is about `s * t` with t in {-1, 0, +1}, and its gradients.

    t = sign(w) where |w| > s / 2, else 0

which is `clip(round(w / s), -1, 1)`, halves to zero, without a division that could round: JAX and
the packer of `ternary.storage.pack` find the same codes to the last one.

The scale starts as the mean absolute value of what shares it. A refit is one step of Lloyd's
algorithm: with the codes fixed, the best scale is the mean magnitude of the weights that are not
zero; with the scale fixed, the codes above are the nearest. No step makes the error larger.

What comes of it is rounded to float16, as it is stored, before the codes of the weight are found:
what is trained is what is saved.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from flux_jax.errors import UserError
from flux_jax.layers import Axes
from flux_jax.partition import constrain
from pallas_kernels import GROUP, group_count, quantize_activations
from pallas_kernels.rounding import rounded
from ternary.exchange import gather_signs

Scale = Float[Array, ""] | Float[Array, " N"] | Float[Array, "N G"]


def round_scale(scale: Scale) -> Scale:
    """`scale` as float16 stores it, in float32; the gradient passes through.

    Beyond float16's range is infinity, which the writer refuses.
    """
    scale = scale.astype(jnp.float32)
    return scale + jax.lax.stop_gradient(rounded(scale, jnp.float16) - scale)


def spread_scale(scale: Scale, shape: tuple[int, ...]) -> Float[Array, "N K"]:
    """The scale of each weight of an (N, K) matrix."""
    if scale.ndim == 2:
        return jnp.repeat(scale, GROUP, axis=1)[:, : shape[1]]
    return jnp.broadcast_to(scale.reshape((-1, 1)), shape)


@functools.partial(jax.jit, static_argnames=("granularity", "refit_steps"))
def fit_scale(weight: Float[Array, "N K"], granularity: str, refit_steps: int = 0) -> Scale:
    """The absolute mean, then `refit_steps` least-squares refits; rounded to float16.

    Args:
      weight: (N, K).
      granularity: one of `ternary.config.GRANULARITIES`.
      refit_steps: number of refits.

    Returns:
      float32 (), (N,) or (N, G).
    """
    magnitude = jnp.abs(weight.astype(jnp.float32))
    scale = _mean(magnitude, None, granularity)
    for _ in range(refit_steps):
        kept = magnitude > 0.5 * spread_scale(scale, weight.shape)
        scale = _mean(magnitude, kept, granularity)
    return round_scale(scale)


def _mean(
    magnitude: Float[Array, "N K"], kept: Array | None, granularity: str
) -> Float[Array, "*scale"]:
    """Mean over what shares a scale, of those `kept`; 0 where none is."""
    rows, columns = magnitude.shape
    counted = jnp.ones_like(magnitude) if kept is None else kept.astype(magnitude.dtype)
    values = magnitude * counted
    if granularity == "tensor":
        total, count = jnp.sum(values), jnp.sum(counted)
    elif granularity == "channel":
        total, count = jnp.sum(values, axis=1), jnp.sum(counted, axis=1)
    else:
        groups = group_count(columns)
        fill = ((0, 0), (0, groups * GROUP - columns))
        parts = [jnp.pad(a, fill).reshape(rows, groups, GROUP) for a in (values, counted)]
        total, count = (jnp.sum(part, axis=2) for part in parts)
    return total / jnp.maximum(count, 1)


def ternary_signs(weight: Float[Array, "N K"], scale: Scale) -> Int8[Array, "N K"]:
    """The nearest of -1, 0, +1 for each weight at this scale; all 0 where the scale is 0."""
    weight = weight.astype(jnp.float32)
    spread = spread_scale(scale.astype(jnp.float32), weight.shape)
    kept = (jnp.abs(weight) > 0.5 * spread) & (spread > 0)
    return jnp.where(kept, jnp.sign(weight), 0).astype(jnp.int8)


def dequantize(signs: Int8[Array, "N K"], scale: Scale) -> Float[Array, "N K"]:
    """`scale * signs`, float32."""
    spread = spread_scale(scale.astype(jnp.float32), signs.shape)
    return signs.astype(jnp.float32) * spread


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def straight_through_signs(
    weight: Float[Array, "N K"], scale: Scale, axes: Axes = (None, None), gather: bool = True
) -> Float[Array, "N K"]:
    """The signs in float32, differentiable: as if they were `weight / scale`, unrounded.

    A product with these signs, multiplied by the scale, then hands its gradient to the latent
    weight as it is, clipped ones included; the scale's own gradient comes from that multiplication
    alone, with the codes fixed.

    Args:
      weight: latent weights.
      scale: as `ternary_signs` takes it.
      axes: the logical names of the weight's dimensions. Each device takes its part of the
        gradient.
      gather: whether devices that share the weight by `fsdp` exchange their parts, as packed codes
        of two bits in place of latent weights of four bytes.
    """
    signs = constrain(ternary_signs(weight, scale), axes)
    return (gather_signs(signs, axes) if gather else signs).astype(jnp.float32)


def _signs_forward(
    weight: Array, scale: Array, axes: Axes, gather: bool
) -> tuple[Array, tuple[Array, Array]]:
    return straight_through_signs(weight, scale, axes, gather), (weight, scale)


def _signs_backward(axes: Axes, gather: bool, saved: tuple[Any, Any], grad: Any) -> tuple[Any, Any]:
    weight, scale = saved
    grad = constrain(grad, axes)
    spread = spread_scale(scale.astype(jnp.float32), weight.shape)
    passed = jnp.where(spread > 0, grad / jnp.where(spread > 0, spread, 1.0), 0.0)
    return passed.astype(weight.dtype), jnp.zeros_like(scale)


straight_through_signs.defvjp(_signs_forward, _signs_backward)


@jax.custom_vjp
def straight_through_tokens(
    x: Float[Array, "*B K"],
) -> tuple[Float[Array, "*B K"], Float[Array, "*B"]]:
    """`quantize_activations` with q as float32, differentiable: as if q were `x / scale`."""
    q, scale, _ = quantize_activations(x)
    return q.astype(jnp.float32), scale


def _tokens_forward(x: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    q, scale = straight_through_tokens(x)
    # Of x, only the dtype is wanted.
    return (q, scale), (scale, jnp.zeros((), x.dtype))


def _tokens_backward(saved: tuple[Any, Any], grads: tuple[Any, Any]) -> tuple[Any]:
    scale, like = saved
    wide = scale[..., None]
    passed = jnp.where(wide > 0, grads[0] / jnp.where(wide > 0, wide, 1.0), 0.0)
    return (passed.astype(like.dtype),)


straight_through_tokens.defvjp(_tokens_forward, _tokens_backward)


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Refuse a low-rank branch that its weight (N, K) has no room for.

    Raises:
      UserError: a rank beyond the smaller side.
    """
    if rank > min(shape):
        raise UserError(f"rank must be at most {min(shape)} beside a weight {shape}, got {rank}")


def low_rank(
    residual: Float[Array, "N K"], rank: int
) -> tuple[Float[Array, "R K"], Float[Array, "N R"]]:
    """The best factors of a residual: `b @ a` is its truncated singular value decomposition.

    From the eigenvectors of the smaller Gram matrix, which is far quicker than the decomposition
    of the whole. The singular values are split evenly.

    Args:
      residual: (N, K).
      rank: R, at most min(N, K).

    Returns:
      (a, b): (R, K) and (N, R), float32.

    Raises:
      UserError: a rank beyond the matrix.
    """
    rows, columns = residual.shape
    check_rank(rank, residual.shape)
    residual = residual.astype(jnp.float32)
    tall = residual if columns <= rows else residual.T
    values, vectors = jnp.linalg.eigh(jnp.matmul(tall.T, tall, precision=jax.lax.Precision.HIGHEST))
    # Ascending; the singular values are the square roots.
    right = vectors[:, ::-1][:, :rank]
    root = jnp.maximum(values[::-1][:rank], 1e-30).reshape((1, -1)) ** 0.25
    left = jnp.matmul(tall, right, precision=jax.lax.Precision.HIGHEST) / root
    a, b = (right * root).T, left
    return (a, b) if columns <= rows else (b.T, a.T)
