"""Scaled dot-product attention: one function, a choice of implementation.

On an NVIDIA GPU in 16 bits the cuDNN flash kernel runs (549 TFLOP/s at FLUX's shape on one H200,
against 148 for the plain XLA path); elsewhere plain XLA, in chunks of queries once the score
matrix would be large. The others are in `flux_jax.attention_kernels`; `benchmarks/attention.py`
compares them.

    cudnn      cuDNN's flash attention, through JAX
    mosaic     JAX's own Pallas Mosaic GPU kernel, for Hopper; in float16
    tokamax    tokamax's Mosaic GPU kernel, where that library is installed
    cudnn_fp8  cuDNN's 8-bit flash attention, for Hopper: q, k, v, weights and result in float8
    xla_fp8    plain JAX with the roundings of cudnn_fp8, anywhere: to see what they cost a picture
    xla        plain JAX, anywhere
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flux_jax import attention_kernels as kernels
from flux_jax.partition import on_each_device

Implementation = Literal["cudnn", "mosaic", "tokamax", "cudnn_fp8", "xla_fp8", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

# Largest score matrix (batch x heads x queries x keys) that the XLA path materialises at once:
# 256 MiB in float32.
_MAX_SCORES = 1 << 26


def default_implementation(q: Float[Array, "B Lq H D"]) -> Implementation:
    """cuDNN where it can run: 16-bit inputs on an NVIDIA GPU, head width at most 128."""
    return "cudnn" if kernels.why_not("cudnn", q, q) is None else "xla"


def attention(
    q: Float[Array, "B Lq H D"],
    k: Float[Array, "B Lk H D"],
    v: Float[Array, "B Lk H D"],
    *,
    bias: Float[Array, "#B H Lq Lk"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B Lq H D"]:
    """`softmax(scale * q @ k.T + bias) @ v` per head; the softmax is in float32.

    Args:
      q, k, v: queries, keys and values.
      bias: added to the scores before the softmax; "cudnn" and "xla" only.
      scale: of the scores; 1 / sqrt(D) by default.
      causal: whether a query sees only the keys up to its own position; "cudnn" and "xla" only.
      implementation: one of `IMPLEMENTATIONS`, or None for `default_implementation`. A named one
        never falls back.

    Returns:
      (B, Lq, H, D), in q's dtype.

    Raises:
      NotImplementedError: the implementation that is asked for cannot compute this here; says why.
    """
    masked = bias is not None or causal
    if implementation is None:
        implementation = "xla" if bias is not None else default_implementation(q)
    elif reason := why_not(implementation, q, k, masked=masked):
        raise NotImplementedError(f"attention {implementation!r} cannot run here: {reason}")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale

    def compute(q: Array, k: Array, v: Array) -> Array:
        if masked or implementation == "cudnn":
            by: Literal["cudnn", "xla"] = "cudnn" if implementation == "cudnn" else "xla"
            return jax.nn.dot_product_attention(
                q, k, v, bias=bias, scale=scale, is_causal=causal, implementation=by
            )
        if implementation in kernels.KERNELS:
            return kernels.KERNELS[implementation](q, k, v, scale).astype(q.dtype)
        return _plain(q, k, v, scale, float8=implementation == "xla_fp8")

    # Plain JAX the compiler splits by itself, by rows of a picture too. A bias has heads of its
    # own, and comes with encoders, which training does not split over devices.
    if bias is not None or implementation in ("xla", "xla_fp8"):
        return compute(q, k, v)
    return on_each_device(compute, ("batch", None, "heads", None), q, k, v)


def is_fused(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a step of a program is cuDNN's attention: a policy for `jax.checkpoint`.

    Its result and the sums of its softmax are what its gradient needs, and no larger than q.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def _plain(q: Array, k: Array, v: Array, scale: float, *, float8: bool) -> Float[Array, "B Lq H D"]:
    """Plain JAX, in chunks of queries where the scores are many."""
    dtype = q.dtype
    if float8:
        (q, dq), (k, dk), (v, dv) = (kernels.to_float8(x) for x in (q, k, v))
        some = functools.partial(kernels.float8_twin, scale=scale * dq * dk, v_scale=dv)
    else:
        some = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="xla")
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    if scores <= _MAX_SCORES:
        return some(q, k, v).astype(dtype)
    return _chunked(some, q, k, v, math.ceil(scores / _MAX_SCORES)).astype(dtype)


def why_not(implementation: str, q: Any, k: Any, *, masked: bool) -> str | None:
    """Why an implementation cannot compute such an attention on this machine; None if it can.

    Args:
      implementation: a name; an unknown one is a reason.
      q, k: queries and keys; shapes and dtypes are enough.
      masked: whether there is a bias or a causal mask.
    """
    if implementation not in IMPLEMENTATIONS:
        return f"it must be one of {', '.join(IMPLEMENTATIONS)}"
    if implementation == "xla":
        return None
    if masked and implementation != "cudnn":
        return "it takes neither a bias nor a causal mask"
    if implementation == "xla_fp8":
        return None
    return kernels.why_not(implementation, q, k)


def _chunked(
    function: Callable[..., Array],
    q: Float[Array, "B Lq H D"],
    k: Float[Array, "B Lk H D"],
    v: Float[Array, "B Lk H D"],
    chunks: int,
) -> Float[Array, "B Lq H D"]:
    """Attention over one chunk of queries at a time; the gradient recomputes the scores."""
    batch, queries, heads, width = q.shape
    size = math.ceil(queries / chunks)
    padded = jnp.pad(q, ((0, 0), (0, size * chunks - queries), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, chunks, size, heads, width).swapaxes(0, 1)
    one_chunk = jax.checkpoint(lambda block: function(block, k, v))
    out = jax.lax.map(one_chunk, blocks).swapaxes(0, 1)
    return out.reshape(batch, size * chunks, heads, width)[:, :queries]
