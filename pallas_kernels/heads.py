"""What attention reads: queries, keys and values of fused projections, normalised and turned.

In plain JAX the norms, the rotation, the joining of two sequences and the copy that an attention
kernel's layout asks for are several passes over memory; in the kernel they are one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import compute_capability, device_of, is_spread, missing_triton
from pallas_kernels.transforms import differentiable, one_by_one

Heads = tuple[Float[Array, "B L H D"], Float[Array, "B L H D"], Float[Array, "B L H D"]]


class Projection(NamedTuple):
    """A sequence of tokens, projected to queries, keys and values.

    Attributes:
      array: (B, tokens, W); a row is [q | k | v | anything], each of `heads * D` channels.
      q_scale, k_scale: (D,), of the norms.
    """

    array: Float[Array, "B _ _"]
    q_scale: Float[Array, " D"]
    k_scale: Float[Array, " D"]


def attention_heads(
    projections: Sequence[Projection],
    cos: Float[Array, "L D2"],
    sin: Float[Array, "L D2"],
    *,
    heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Heads:
    """Queries and keys, normalised over a head (RMS) and turned by their position; and values.

    Of sequences that are joined, the first before the second. Each neighbouring pair of channels
    `(a, b)` becomes `(a cos - b sin, b cos + a sin)`: the rotary embedding of RoFormer (arXiv
    2104.09864) as FLUX lays it out. Norm and rotation are computed in float32 and rounded to the
    projections' type where plain JAX rounds: after the norm, after its scale, after the rotation.

    Differentiable; under `vmap`, a loop.

    Args:
      projections: one or two, of one type; L tokens in all.
      cos, sin: float32, of every position.
      heads: H; D is twice the width of `cos`.
      eps: added to the mean square.
      backend: "triton" (compute capability 8.0 or more, 16-bit projections, D a power of two of at
        least 16) or "jax", anywhere; None takes the first that can run.

    Returns:
      q, k, v, each (B, L, H, D).

    Raises:
      ValueError: shapes that do not fit together, or no such backend.
      NotImplementedError: the backend that is asked for cannot run here; says why.
    """
    return _computed(projections, cos, sin, heads, eps, backend, groups=None)


def grouped_heads(
    projections: Sequence[Projection],
    cos: Float[Array, "L D2"],
    sin: Float[Array, "L D2"],
    *,
    heads: int,
    groups: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Float[Array, "G 3 B L h D"]:
    """`attention_heads`, of each group of neighbouring heads together: what one device is sent.

    Args:
      projections, cos, sin, heads, eps, backend: as for `attention_heads`.
      groups: G, which divides the heads.

    Returns:
      (G, 3, B, L, H / G, D): of each group q, k and v.

    Raises:
      ValueError: groups that do not divide the heads, and as `attention_heads`.
      NotImplementedError: as `attention_heads`.
    """
    if groups < 1 or heads % groups:
        raise ValueError(f"groups must divide the {heads} heads, got {groups}")
    return _computed(projections, cos, sin, heads, eps, backend, groups=groups)


def _computed(
    projections: Sequence[Projection],
    cos: Array,
    sin: Array,
    heads: int,
    eps: float,
    backend: str | None,
    *,
    groups: int | None,
) -> Any:
    """Heads by one of the backends; grouped, or as three arrays if `groups` is None."""
    _check(projections, cos, sin, heads)
    # Of one type with the tokens, as the kernel's pointers must be; they would be rounded anyway.
    flat = [array.astype(one.array.dtype) for one in projections for array in one]
    if backend not in (None, "triton", "jax"):
        raise ValueError(f"backend must be None, 'triton' or 'jax', got {backend!r}")
    if backend == "triton" and (reason := why_not(projections[0].array, cos)):
        raise NotImplementedError(f"backend 'triton' cannot compute these heads: {reason}")
    if backend is None:
        spread = is_spread(*flat)
        backend = "jax" if spread or why_not(projections[0].array, cos) else "triton"
    return _compute(backend, len(projections), heads, eps, groups)(*flat, cos, sin)


def why_not(array: Any, cos: Any) -> str | None:
    """Why the kernel cannot run on such a projection; None if it can. Of types and shapes alone."""
    device = device_of(array)
    capability = compute_capability(device)
    width = 2 * cos.shape[-1]
    if capability is None:
        return f"it needs an NVIDIA GPU, got the {device.platform} device {device.device_kind!r}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    if array.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, got {array.dtype.name}"
    if width < 16 or width & (width - 1):
        return f"it needs a head of 16, 32, 64 or 128 channels or so, got {width}"
    if not array.size:
        return "there are no tokens"
    return missing_triton()


def plain(
    projections: Sequence[Projection], cos: Array, sin: Array, *, heads: int, eps: float
) -> Heads:
    """`attention_heads` in plain JAX."""
    length, width = cos.shape[0], 2 * cos.shape[1]
    # Two products with whole rows, one of them with the channels swapped in pairs: one pass of
    # XLA's. Taking the pairs apart and interleaving them again costs it a concatenation.
    both = jnp.stack((cos, cos), axis=-1).reshape(1, length, 1, width)
    signed = jnp.stack((-sin, sin), axis=-1).reshape(1, length, 1, width)

    def normalised(x: Array, scale: Array) -> Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype).reshape(1, 1, 1, width)

    def turned(x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        swapped = x32.reshape(*x.shape[:-1], width // 2, 2)[..., ::-1].reshape(x.shape)
        return (x32 * both + swapped * signed).astype(x.dtype)

    each = []
    for array, q_scale, k_scale in projections:
        thirds = jnp.split(array[..., : 3 * heads * width], 3, axis=-1)
        q, k, v = (part.reshape(*array.shape[:2], heads, width) for part in thirds)
        each.append((normalised(q, q_scale), normalised(k, k_scale), v))
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*each, strict=True))
    return turned(q), turned(k), v


def grouped(q: Array, k: Array, v: Array, groups: int) -> Float[Array, "G 3 B L h D"]:
    """What `grouped_heads` returns, from heads as three arrays."""
    stacked = jnp.stack((q, k, v))
    parts = stacked.reshape(*stacked.shape[:3], groups, -1, stacked.shape[-1])
    return jnp.moveaxis(parts, 3, 0)


@functools.cache
def _compute(backend: str, count: int, heads: int, eps: float, groups: int | None) -> Any:
    """Takes a flat list of arrays: those of each of `count` projections, cosines, sines."""

    def projections_of(arrays: tuple[Any, ...]) -> list[Projection]:
        return [Projection(*arrays[3 * i : 3 * i + 3]) for i in range(count)]

    def reference(*arrays: Any) -> Any:
        each = plain(projections_of(arrays), *arrays[-2:], heads=heads, eps=eps)
        return each if groups is None else grouped(*each, groups)

    if backend == "jax":
        return reference

    @jax.custom_batching.custom_vmap
    def kernel(*arrays: Any) -> Any:
        from pallas_kernels import triton_heads

        given = (projections_of(arrays), *arrays[-2:])
        if groups is not None:
            return triton_heads.grouped_heads(*given, heads=heads, groups=groups, eps=eps)
        return tuple(triton_heads.attention_heads(*given, heads=heads, eps=eps))

    @kernel.def_vmap
    def _(size: int, batched: Any, *arrays: Any) -> Any:
        every = [
            array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            for array, is_batched in zip(arrays, batched, strict=True)
        ]
        done = one_by_one(kernel, every, size)
        return done, jax.tree.map(lambda _: True, done)

    # Under jit a program lowers a kernel once for all its calls of the same shapes.
    return differentiable(jax.jit(kernel), reference)


def _check(projections: Sequence[Projection], cos: Any, sin: Any, heads: int) -> None:
    if len(projections) not in (1, 2):
        raise ValueError(f"projections: expected one or two, got {len(projections)}")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos and sin: expected (L, D / 2) each, got {cos.shape} and {sin.shape}")
    length, width = cos.shape[0], 2 * cos.shape[1]
    first = projections[0].array
    for index, (array, *scales) in enumerate(projections):
        if array.ndim != 3 or array.shape[0] != first.shape[0] or array.dtype != first.dtype:
            raise ValueError(
                f"projection {index}: expected ({first.shape[0]}, tokens, channels) of "
                f"{first.dtype.name}, got {array.shape} of {array.dtype.name}"
            )
        if array.shape[2] < 3 * heads * width:
            raise ValueError(
                f"projection {index}: {heads} heads of {width} channels need rows of at least "
                f"{3 * heads * width}, got {array.shape[2]}"
            )
        for name, scale in zip(("q_scale", "k_scale"), scales, strict=True):
            if scale.shape != (width,):
                raise ValueError(
                    f"projection {index}: expected {name} of ({width},), got {scale.shape}"
                )
    tokens = sum(projection.array.shape[1] for projection in projections)
    if tokens != length:
        raise ValueError(f"expected as many tokens as positions, got {tokens} and {length}")
