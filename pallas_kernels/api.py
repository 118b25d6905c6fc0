"""The public ops: a product with packed ternary weights, and what makes int8 of its activations."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels import reference
from pallas_kernels.arguments import check_matmul, check_modulation
from pallas_kernels.backends import choose, describe, device_of, is_spread
from pallas_kernels.reference import Activations, Scale
from pallas_kernels.tile_table import Device
from pallas_kernels.transforms import differentiable, foldable

Quantized = tuple[Int8[Array, "*B K"], Float[Array, "*B"]]


def ternary_matmul(
    x: Activations,
    packed: UInt8[Array, "N Kp"],
    scale: Scale,
    bias: Float[Array, " N"] | None = None,
    *,
    activation_bits: int = 16,
    out_dtype: Any = None,
    backend: str | None = None,
    token_scale: Float[Array, "*B"] | None = None,
    gelu: bool = False,
    gate: Float[Array, " N"] | None = None,
    residual: Float[Array, "*B N"] | None = None,
) -> Float[Array, "*B N"]:
    """`residual + gate * gelu(x @ (scale * weight).T + bias)` for a packed ternary weight.

    Bias, GELU, gate and residual are there only if asked for. All of it is float32 after the sums,
    and rounded once, to `out_dtype`; formula and order are in `pallas_kernels.reference`.

    Where it runs:

        mosaic   bfloat16 x with 16-bit activations, any floating or int8 x with 8-bit ones
        triton   as mosaic, and float16 x with 16-bit activations
        jax      everything

    Every backend takes every kind of scale and every option, any M, N and K. Results have 16 or 32
    bits; other types only in plain JAX. A scale per group costs Mosaic most of what int8 gains.

    Differentiable in everything floating. The gradient is that of the product with 16-bit
    activations: the rounding to int8 counts as the identity. Under `vmap`, a batch of x,
    `token_scale` and `residual` becomes more rows; a batch of weights is a loop. An array that is
    spread over several devices is left to plain JAX, which XLA partitions: use `jax.shard_map` for
    kernels on each.

    Args:
      x: (..., K), floating; at least one axis. Or int8, already quantised, with `token_scale`.
      packed: (N, Kp) in the layout of `pallas_kernels.packing`.
      scale: of the weight: per tensor (), per output (N,), or per group of 128 inputs
        (N, ceil(K / 128)).
      bias: (N,) or None.
      activation_bits: 16 multiplies x as it is; 8 quantises each token to int8 first and sums in
        int32, exactly. Must be 8 for x of int8.
      out_dtype: of the result; by default x's, bfloat16 for x of int8.
      backend: one of `pallas_kernels.BACKENDS`; None is plain JAX, or with
        PALLAS_KERNELS_AUTOMATIC=1 in the environment the first that can run on the device that x
        lies on (JAX's default device while tracing).
      token_scale: (...) float32, of x of int8, as `quantize_activations` returns it.
      gelu: GELU in its tanh form.
      gate: (N,), a factor.
      residual: (..., N), a summand.

    Returns:
      (..., N).

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown backend, or one that
        cannot run here.
    """
    check_matmul(x, packed, scale, bias, activation_bits, backend, token_scale, gate, residual)
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype
    out_dtype = jnp.dtype(out_dtype)
    device = device_of(x)
    if backend is None and is_spread(x):
        name = "jax"
    else:
        name = choose(backend, device, x.dtype, out_dtype, activation_bits)
    if not x.size or not packed.size:
        # Nothing to launch a kernel for.
        name = "jax"
    product = _product(name, activation_bits, out_dtype, gelu, describe(device))
    if token_scale is not None:
        token_scale = token_scale.reshape(-1)
    if residual is not None:
        residual = residual.reshape(-1, packed.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, packed, scale, bias, token_scale, gate, residual)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def quantize_activations(x: Float[Array, "*B K"], *, backend: str | None = "jax") -> Quantized:
    """Each token to int8 with its own scale: `q * scale` is about `x`.

    The largest magnitude of a token becomes 127; halves go to even. A token of zeros has scale 0, a
    token that is not finite a scale that is not finite. Every backend gives the same bits.

    Args:
      x: (..., K).
      backend: as in `ternary_matmul`; Triton's is plain JAX. None takes a kernel where there is
        one. The default is plain JAX, which XLA differentiates and partitions.

    Returns:
      (q, scale): int8 (..., K) in [-127, 127], and float32 (...).

    Raises:
      ValueError: x is not floating, or the backend is unknown or cannot run here.
    """
    check_modulation(x, None, None, backend)
    name, device = _backend_of_rows(x, backend)
    if name != "mosaic":
        return reference.quantize_activations(x)
    q, scale = _quantizer(device)(x.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def normalize_and_quantize(
    x: Float[Array, "*B K"],
    gain: Float[Array, " K"] | None = None,
    shift: Float[Array, " K"] | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Quantized:
    """Each token normalised, modulated and quantised to int8, in one pass over memory.

    `quantize_activations(layer_norm(x) * (1 + gain) + shift)` in float32 throughout: nothing is
    rounded to x's type on the way. The mean is over K, the variance that of the whole row. Backends
    differ in the order of two sums, so that a value which is all but halfway between two integers
    can fall to either. For inference: it has no gradient.

    Args:
      x: (..., K).
      gain: (K,), how much more than 1 the factor is; None for 0.
      shift: (K,), a summand; None for 0.
      eps: added to the variance.
      backend: as in `ternary_matmul`; Triton's is plain JAX.

    Returns:
      (q, scale): int8 (..., K), and float32 (...), for `ternary_matmul(q, ..., token_scale=scale)`.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a backend that is unknown or cannot run here.
    """
    check_modulation(x, gain, shift, backend)
    name, device = _backend_of_rows(x, backend)
    rows = _normalizer(name, eps, device)
    q, scale = rows(x.reshape(-1, x.shape[-1]), gain, shift)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def _backend_of_rows(x: Any, backend: str | None) -> tuple[str, Device]:
    """The backend for something that is done to the rows of x, and the device."""
    device = device_of(x)
    if backend is None and (is_spread(x) or not x.size):
        return "jax", describe(device)
    # Results are int8: what the products want of the types does not matter.
    name = choose(backend, device, x.dtype, jnp.dtype(jnp.float32), 8)
    return (name if x.size else "jax"), describe(device)


@functools.cache
def _product(backend: str, activation_bits: int, out_dtype: Any, gelu: bool, device: Device) -> Any:
    """The product of x (M, K) on one backend, with its gradient and its rule for vmap."""
    bits: dict[str, Any] = {"activation_bits": activation_bits, "gelu": gelu}

    def plain(*arrays: Any) -> Any:
        return reference.ternary_matmul(*arrays, **bits).astype(out_dtype)

    def kernel(*arrays: Any) -> Any:
        if backend == "triton":
            from pallas_kernels import triton_matmul as module
        else:
            from pallas_kernels import mosaic as module
        return module.ternary_matmul(*arrays, **bits, out_dtype=out_dtype, device=device)

    def straight_through(x: Any, *others: Any) -> Any:
        through = 8 if x.dtype == jnp.int8 else 16
        y = reference.ternary_matmul(x, *others, activation_bits=through, gelu=gelu)
        return y.astype(out_dtype)

    # x, token_scale and residual have rows. Plain JAX is batched by JAX.
    compute = plain if backend == "jax" else foldable(kernel, per_row=(0, 4, 6))
    return differentiable(compute, straight_through)


@functools.cache
def _quantizer(device: Device) -> Any:
    def quantize(x: Any) -> Any:
        from pallas_kernels import mosaic

        return mosaic.quantize(x, device=device)[:2]

    return foldable(quantize, per_row=(0,))


@functools.cache
def _normalizer(backend: str, eps: float, device: Device) -> Any:
    def plain(x: Any, gain: Any, shift: Any) -> Any:
        return reference.normalize_and_quantize(x, gain, shift, eps)

    def kernel(x: Any, gain: Any, shift: Any) -> Any:
        from pallas_kernels import mosaic

        return mosaic.normalize_and_quantize(x, gain, shift, eps=eps, device=device)

    return foldable(kernel, per_row=(0,)) if backend == "mosaic" else plain
