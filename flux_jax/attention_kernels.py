"""Kernels for attention on a GPU that `flux_jax.attention` can be asked for, and what they need.

Each is imported where it is called: a library may be missing, and Pallas takes long to load.

The 8-bit kernel is cuDNN's. It takes q, k, v in float8 (e4m3) with one scale each, rounds the
softmax's weights to float8 before they meet v, and returns float8. JAX has the call, but under no
public name; a JAX that moves it makes `why_not` say so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import compute_capability, device_of

FLOAT8 = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(FLOAT8).max)
_CUDNN = "jax._src.cudnn.fused_attention_stablehlo"
# Of JAX's Mosaic kernel: queries of each of two warpgroups, and keys at a time. 128 queries spill
# registers.
_BLOCK_Q, _BLOCK_KV = 64, 128


def why_not(implementation: str, q: Any, k: Any) -> str | None:
    """As `flux_jax.attention.why_not`, for what needs a GPU."""
    device = device_of(q)
    capability = compute_capability(device)
    if capability is None:
        return f"it needs an NVIDIA GPU, got the {device.platform} device {device.device_kind!r}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    width, least = q.shape[-1], {"cudnn": 8, "cudnn_fp8": 16}.get(implementation, 64)
    if width % least or width > 128:
        return f"it needs a head width that is a multiple of {least}, at most 128; got {width}"
    version = f"{capability[0]}.{capability[1]}"
    if implementation == "cudnn":
        # What JAX asks of a GPU for it.
        old = capability < (8, 0)
        return f"it needs compute capability 8.0 or more, got {version}" if old else None
    if implementation == "tokamax" and (missing := missing_tokamax()):
        return missing
    if capability[0] != 9:
        return f"it needs compute capability 9.x (Hopper), got {version}"
    rows, columns = q.shape[1], k.shape[1]
    if implementation == "mosaic" and (rows % (2 * _BLOCK_Q) or columns % _BLOCK_KV):
        return (
            f"it needs queries in multiples of {2 * _BLOCK_Q} and keys in multiples of "
            f"{_BLOCK_KV}, got {rows} and {columns}"
        )
    if implementation == "cudnn_fp8" and not hasattr(_cudnn(), "dot_product_attention"):
        return f"JAX {jax.__version__} has no {_CUDNN}.dot_product_attention"
    return None


def missing_tokamax() -> str | None:
    """Why tokamax cannot be imported; None if it can."""
    try:
        importlib.import_module("tokamax")
    except ImportError as error:
        return f"tokamax cannot be imported ({error}): pip install tokamax"
    return None


def _cudnn() -> Any:
    try:
        return importlib.import_module(_CUDNN)
    except ImportError:
        return None


def _mosaic(q: Array, k: Array, v: Array, scale: float) -> Array:
    """JAX's own kernel. It is written for float16 and does not scale."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    steps = min(2, k.shape[1] // _BLOCK_KV)
    config = attention_mgpu.TuningConfig(
        block_q=_BLOCK_Q, block_kv=_BLOCK_KV, max_concurrent_steps=steps
    )
    scaled = (q.astype(jnp.float32) * scale).astype(jnp.float16)
    return attention_mgpu.attention(scaled, k.astype(jnp.float16), v.astype(jnp.float16), config)


def _tokamax(q: Array, k: Array, v: Array, scale: float) -> Array:
    # Optional, and for newer versions of Python than the oldest of ours.
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.dot_product_attention(q, k, v, scale=scale, implementation="mosaic")


def _cudnn_fp8(q: Array, k: Array, v: Array, scale: float) -> Array:
    """cuDNN's kernel; the scales of q, k and v from their largest magnitudes."""
    (q8, dq), (k8, dk), (v8, dv) = (to_float8(x) for x in (q, k, v))
    cudnn, one = _cudnn(), jnp.ones((1, 1, 1, 1), jnp.float32)

    def wide(value: Any) -> Array:
        return one * value

    # Those of the gradient are asked for too, and not used.
    params = dict.fromkeys(cudnn.fp8_params_keys, one) | {
        "descale_q": wide(dq),
        "descale_k": wide(dk),
        "descale_v": wide(dv),
        # Weights of the softmax are at most 1; the result is no larger than v.
        "scale_s": wide(_LARGEST),
        "descale_s": wide(1 / _LARGEST),
        "scale_o": wide(1 / dv),
    }
    out, *_ = cudnn.dot_product_attention(
        q8, k8, v8, fp8_params=params, scale=scale, use_fp8=True, qkv_layout="BTNH"
    )
    return out.astype(jnp.float32) * dv


KERNELS: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    "mosaic": _mosaic,
    "tokamax": _tokamax,
    "cudnn_fp8": _cudnn_fp8,
}


def to_float8(x: Float[Array, "B L H D"]) -> tuple[Float[Array, "B L H D"], Float[Array, ""]]:
    """(x / scale in float8, scale); the largest magnitude becomes float8's largest."""
    x32 = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x32))
    scale = jnp.where(largest > 0, largest, 1.0) * jnp.float32(1 / _LARGEST)
    # Rounded up, the largest would be past the end of float8.
    scaled = jnp.clip(x32 / scale, -_LARGEST, _LARGEST)
    return scaled.astype(FLOAT8), scale


def float8_twin(
    q: Float[Array, "B Lq H D"],
    k: Float[Array, "B Lk H D"],
    v: Float[Array, "B Lk H D"],
    *,
    scale: Float[Array, ""],
    v_scale: Float[Array, ""],
) -> Float[Array, "B Lq H D"]:
    """Plain JAX with the roundings of cuDNN's 8-bit kernel.

    The kernel sees the keys in blocks, and rounds weights relative to the largest so far; here they
    are relative to the largest of all.

    Args:
      q, k, v: float8, from `to_float8`.
      scale: of the scores, those of q and k included.
      v_scale: of v.

    Returns:
      float32.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1).swapaxes(1, 2)[..., None]
    rounded = (weights * _LARGEST).astype(FLOAT8).astype(jnp.float32) * jnp.float32(1 / _LARGEST)
    out = jnp.einsum("bhqk,bkhd->bqhd", rounded, v) / total
    return out.astype(FLOAT8).astype(jnp.float32) * v_scale
