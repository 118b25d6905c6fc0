"""The public ops: a product with packed ternary weights, and what makes int8 of its activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import reference
from pallas_kernels.arguments import check_columns, check_matmul, check_modulation
from pallas_kernels.backends import choose, describe, device_of, is_spread
from pallas_kernels.operands import PER_ROW, PER_RUN, Operands
from pallas_kernels.reference import Activations, Columns, Quantized, Scale
from pallas_kernels.tile_table import Device
from pallas_kernels.transforms import differentiable, foldable

# One for all tokens, or one for each of their first axis.
Vectors = Float[Array, " N"] | Float[Array, "B N"]


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
    row_sum: Int32[Array, "*B"] | None = None,
    gelu: bool = False,
    gate: Vectors | None = None,
    residual: Float[Array, "*B N"] | None = None,
    low_rank: tuple[Float[Array, "*B R"], Float[Array, "N R"]] | None = None,
    leave: int = 0,
) -> Float[Array, "*B N"]:
    """`residual + gate * gelu(x @ (scale * weight).T + bias + u @ v.T)` for packed ternary weights.

    Bias, branch (u and v), GELU, gate and residual are there only if asked for. All of it is
    float32 after the sums, and rounded once, to `out_dtype`; formula and order are in
    `pallas_kernels.reference`.

    Where it runs:

        mosaic   bfloat16 x with 16-bit activations, any floating or int8 x with 8-bit ones
        triton   as mosaic, and float16 x with 16-bit activations
        jax      everything

    Some kernels with 16-bit activations sum twice the products: beyond 1.7e38 x becomes inf.
    Every backend takes every kind of scale and every option, any M, N and K (of 8-bit activations
    up to 264,208). Results have 16 or 32 bits; other types only in plain JAX. A scale per group
    costs Mosaic most of what int8 gains.

    Differentiable in everything floating, in reverse mode (no `jvp`). The gradient is that of the
    product with 16-bit activations: the rounding to int8 counts as the identity. Under `vmap`, a
    batch of x, `token_scale`, `gate`, `residual` and u becomes more rows; a batch of weights is a
    loop. An array that is spread over several devices is left to plain JAX, which XLA partitions:
    use `jax.shard_map` for kernels on each.

    Args:
      x: (..., K), floating; at least one axis. Or int8, already quantised, with `token_scale`.
      packed: (N, Kp) in the layout of `pallas_kernels.packing`.
      scale: of the weight: per tensor (), per output (N,), or per group of 128 inputs
        (N, ceil(K / 128)).
      bias: (N,) or None.
      activation_bits: 16 multiplies x as it is; 8 quantises each token to int8 first and sums in
        int32, exactly. Must be 8 for x of int8.
      out_dtype: of the result; by default x's, bfloat16 for x of int8.
      backend: one of `pallas_kernels.BACKENDS`; None takes the first that can run on the device
        that x lies on (JAX's default device while tracing).
      token_scale: (...) float32, of x of int8, as `quantize_activations` returns it.
      row_sum: (...) int32, the sums of x of int8, as `quantize_activations` returns them. Nothing
        depends on it but the time that Mosaic takes to decode the weight.
      gelu: GELU in its tanh form.
      gate: (N,), a factor; or (B, N), one for each of the first axis of x (an image of a batch).
      residual: (..., N), a summand.
      low_rank: u (..., R) and v (N, R), of one floating type. Of bfloat16, Mosaic's kernel for many
        rows multiplies them too (more than 64, or a scale per group), and Triton's kernels of
        either 16-bit type. XLA does elsewhere, and the float32 result goes through memory; float32
        is multiplied as XLA's default has it, which on a GPU is TF32.
      leave: multiprocessors of the GPU that are left to what runs beside the product, such as an
        exchange with other devices. Mosaic's kernel for many rows takes all others for as long as
        it runs; no other kernel heeds it.

    Returns:
      (..., N).

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown backend.
      NotImplementedError: the backend that is asked for cannot run here.
    """
    check_matmul(
        x,
        packed,
        scale,
        bias,
        activation_bits=activation_bits,
        token_scale=token_scale,
        row_sum=row_sum,
        gate=gate,
        residual=residual,
        low_rank=low_rank,
        leave=leave,
    )
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype
    out_dtype = jnp.dtype(out_dtype)
    device = device_of(x)
    u, v = low_rank or (None, None)
    operands = Operands(scale, bias, token_scale, row_sum, gate, residual, u, v)
    if backend is None and is_spread(x, packed, *operands):
        name = "jax"
    else:
        name = choose(backend, device, x.dtype, out_dtype, activation_bits)
    if not x.size or not packed.size:
        # Nothing to launch a kernel for.
        name = "jax"
    product = _product(name, activation_bits, out_dtype, gelu, describe(device).without(leave))
    rows, outputs = math.prod(x.shape[:-1]), packed.shape[0]

    def flat(value: Any) -> Any:
        leading = x.ndim - 1
        return None if value is None else value.reshape(rows, *value.shape[leading:])

    flattened = {name: flat(getattr(operands, name)) for name in PER_ROW}
    operands = operands._replace(**flattened, gate=_stacked(gate))
    y = product(flat(x), packed, *operands)
    return y.reshape(*x.shape[:-1], outputs)


def quantize_activations(x: Float[Array, "*B K"], *, backend: str | None = "jax") -> Quantized:
    """Each token to int8 with its own scale: `q * scale` is about `x`.

    The largest magnitude of a token becomes 127; halves go to even. A token of zeros has scale 0, a
    token that is not finite a scale that is not finite, a sum of 0, and any values. Of all others
    every backend gives the same bits.

    Args:
      x: (..., K).
      backend: as in `ternary_matmul`; Triton's is plain JAX. None takes a kernel where there is
        one. The default is plain JAX, which XLA differentiates and partitions.

    Raises:
      ValueError: x is not floating, or the backend is unknown.
      NotImplementedError: the backend that is asked for cannot run here.
    """
    check_modulation(x, None, None)
    return quantize_columns([Columns(x, 0, x.shape[-1])], backend=backend)


def quantize_columns(parts: Sequence[Columns], *, backend: str | None = None) -> Quantized:
    """Columns of several arrays, joined, as int8 with one scale a token; read where they lie.

    `quantize_activations` of `concatenate([gelu(array[..., start : start + size]), ...], -1)`, GELU
    where a part says so, in one pass over memory and in float32: nothing is rounded to a 16-bit
    type on the way. Where there is GELU, backends differ by the last bits of an exponential, so
    that a value which is all but halfway between two integers can fall to either. For inference: it
    has no gradient.

    Args:
      parts: with the same leading axes; K is the sum of their sizes.
      backend: as in `ternary_matmul`; Triton's is plain JAX. The Mosaic kernel takes sizes that are
        multiples of 128, plain JAX is used for others.

    Raises:
      ValueError: parts that do not fit together, or an unknown backend.
      NotImplementedError: the backend that is asked for cannot run here.
    """
    check_columns(parts)
    name, device = _backend_of_rows([part.array for part in parts], backend)
    if name != "mosaic":
        return reference.quantize_columns(parts)
    leading = parts[0].array.shape[:-1]
    compute = _quantizer(tuple(part[1:] for part in parts), device)
    done = compute(*(p.array.reshape(math.prod(leading), p.array.shape[-1]) for p in parts))
    return _unfold(done, leading)


def normalize_and_quantize(
    x: Float[Array, "*B K"],
    gain: Vectors | None = None,
    shift: Vectors | None = None,
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
      gain: how much more than 1 the factor is: (K,), or (B, K), one for each of the first axis of
        x (an image of a batch); None for 0.
      shift: a summand, likewise.
      eps: added to the variance.
      backend: as in `ternary_matmul`; Triton's is plain JAX.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown backend.
      NotImplementedError: the backend that is asked for cannot run here.
    """
    check_modulation(x, gain, shift)
    name, device = _backend_of_rows([x, gain, shift], backend)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    done = _normalizer(name, eps, device)(rows, _stacked(gain), _stacked(shift))
    return _unfold(done, x.shape[:-1])


def _stacked(vectors: Any) -> Any:
    """(N,) as (1, N); (B, N) and None as they are."""
    return vectors[None] if vectors is not None and vectors.ndim == 1 else vectors


def _unfold(rows: Quantized, leading: tuple[int, ...]) -> Quantized:
    """Rows with the leading axes that they had."""
    values = rows.values.reshape(*leading, rows.values.shape[-1])
    return Quantized(values, rows.scale.reshape(leading), rows.row_sum.reshape(leading))


def _backend_of_rows(arrays: Sequence[Any], backend: str | None) -> tuple[str, Device]:
    """The backend for something that is done to rows, those of the first array; and the device."""
    x = arrays[0]
    device = device_of(x)
    if backend is None and (is_spread(*arrays) or not x.size):
        return "jax", describe(device)
    # Results are int8: what the products want of the types does not matter.
    name = choose(backend, device, x.dtype, jnp.dtype(jnp.float32), 8)
    return (name if x.size else "jax"), describe(device)


@functools.cache
def _product(backend: str, activation_bits: int, out_dtype: Any, gelu: bool, device: Device) -> Any:
    """The product of x (M, K), packed and `Operands`, one by one, on one backend.

    With its gradient and its rule for vmap.
    """
    bits: dict[str, Any] = {"activation_bits": activation_bits, "gelu": gelu}

    def plain(x: Any, packed: Any, *others: Any) -> Any:
        return reference.ternary_matmul(x, packed, Operands(*others), **bits).astype(out_dtype)

    def kernel(x: Any, packed: Any, *others: Any) -> Any:
        if backend == "triton":
            from pallas_kernels import triton_matmul as module
        else:
            from pallas_kernels import mosaic as module
        settings = {**bits, "out_dtype": out_dtype, "device": device}
        return module.ternary_matmul(x, packed, Operands(*others), **settings)

    def straight_through(x: Any, packed: Any, *others: Any) -> Any:
        through = 8 if x.dtype == jnp.int8 else 16
        settings = {"activation_bits": through, "gelu": gelu}
        return reference.ternary_matmul(x, packed, Operands(*others), **settings).astype(out_dtype)

    def places(names: Sequence[str]) -> tuple[int, ...]:
        return tuple(2 + Operands._fields.index(name) for name in names)

    # Plain JAX is batched by JAX.
    fold = functools.partial(foldable, per_row=(0, *places(PER_ROW)), per_run=places(PER_RUN))
    compute = plain if backend == "jax" else _lowered_once(fold(kernel))
    return differentiable(compute, straight_through)


@functools.cache
def _quantizer(parts: tuple[tuple[int, int, bool], ...], device: Device) -> Any:
    """Quantises the columns of arrays (M, W) that each entry of `parts` names; on Mosaic."""

    def quantize(*arrays: Any) -> Any:
        from pallas_kernels import mosaic

        columns = [Columns(array, *part) for array, part in zip(arrays, parts, strict=True)]
        return mosaic.quantize(columns, device=device)

    return _lowered_once(foldable(quantize, per_row=tuple(range(len(parts)))))


@functools.cache
def _normalizer(backend: str, eps: float, device: Device) -> Any:
    def plain(x: Any, gain: Any, shift: Any) -> Any:
        return reference.normalize_and_quantize(x, gain, shift, eps)

    def kernel(x: Any, gain: Any, shift: Any) -> Any:
        from pallas_kernels import mosaic

        return mosaic.normalize_and_quantize(x, gain, shift, eps=eps, device=device)

    if backend != "mosaic":
        return plain
    return _lowered_once(foldable(kernel, per_row=(0,), per_run=(1, 2)))


def _lowered_once(kernel: Any) -> Any:
    """A kernel that a program lowers once for all its calls of the same shapes.

    Lowering takes some 0.1 s of Python: a model calls the same few kernels hundreds of times.
    """
    return jax.jit(kernel)
