"""What the Mosaic GPU kernels need from JAX under names that change between its versions.

Everything that depends on the version of JAX is in this file. Imported late: it loads Pallas.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental import pallas as pl


def interpret_params() -> Any:
    """Parameters of Pallas' GPU interpret mode: public since JAX 0.11."""
    public = getattr(plgpu, "InterpretGPUParams", None)
    if public is not None:
        return public()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def product_kernel(body: Any, *, interpret: Any, **settings: Any) -> Any:
    """`plgpu.kernel` as all products need it: warpgroups on an axis "group", own barriers.

    Args:
      body: of references.
      interpret: None on a GPU, else the parameters of Pallas' GPU interpret mode.
      settings: of `plgpu.kernel`; `num_threads` is how many warpgroups.
    """
    if interpret is not None:
        settings["interpret"] = interpret
    parameters = plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
    return plgpu.kernel(body, thread_name="group", compiler_params=parameters, **settings)


def transpose_ref(ref: Any) -> Any:
    """A two-dimensional reference with its axes exchanged: a method since JAX 0.11."""
    if hasattr(plgpu, "transform_ref"):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def accumulator(shape: tuple[int, int], dtype: Any) -> Any:
    """Registers that the tensor cores sum in, for `pl.run_scoped`."""
    # Public, but for a type checker not exported.
    return plgpu.ACC(shape, dtype)  # pyright: ignore[reportPrivateImportUsage]


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Any:
    """A reference's values in registers of this layout; on a GPU only.

    Args:
      ref: in shared or global memory.
      layout: of the result.
      optimized: an error where there is no fast way to load it.
    """
    if _IS_OLD:
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]


# JAX 0.10: there, a load wants an index, of which 0.11 warns.
_IS_OLD = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty


def read(ref: Any, layout: Any, native: bool) -> Any:
    """A reference's values, in registers of this layout."""
    return load(ref, layout, optimized=False) if native else ref[...]


def tiled(rows: int, columns: int, dtype: Any, swizzle: int, leading: tuple[int, ...] = ()) -> Any:
    """Shared memory in the tiling that the tensor cores and the copy engine share.

    Args:
      rows, columns: of one buffer; rows a multiple of 8, columns of `swizzle` bytes.
      dtype: of the elements.
      swizzle: bytes of a tile's row.
      leading: leading axes, such as the stages.
    """
    size = jax.numpy.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((*leading, rows, columns), dtype, transforms=transforms)


def whole(size: int, unit: int) -> int:
    """`size`, rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def whole_tiles(x: Any, columns: int, block: tuple[int, int] | None = None) -> Any:
    """A matrix with zeros added, so that columns are whole tiles, and rows too if they are over 8.

    The copy engine cuts off what lies outside of an array, but Pallas wants whole tiles of one that
    is swizzled: 8 rows of `columns`. Interpret mode of JAX 0.10 cuts nothing off: there, `block`
    is what is copied at once, and the matrix becomes a multiple of it.
    """
    rows, width = x.shape
    if block is None:
        block = (1 if rows <= 8 else 8, columns)
    more = [(0, whole(size, unit) - size) for size, unit in zip((rows, width), block, strict=True)]
    return jax.numpy.pad(x, more) if any(after for _, after in more) else x


def store_transposed(ref: Any, value: Any, native: bool) -> None:
    """Writes `value` (outputs, tokens), in the accumulator's layout, to `ref` (tokens, outputs)."""
    if not native:
        ref[...] = value.T
        return
    # Only 16-bit values have an instruction that transposes on the way to shared memory; JAX 0.10
    # does not take it for a reference that is transposed.
    if value.dtype.itemsize != 2 or _IS_OLD:
        value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    transpose_ref(ref)[...] = value


def multiply(acc: Any, a: Any, b: Any, spare: Any) -> None:
    """`acc += a @ b.T`, without waiting for it.

    Args:
      acc: (rows, tokens), an accumulator of the tensor cores.
      a: (rows, K), values in registers.
      b: (tokens, K), in shared memory.
      spare: empty on a GPU. Interpret mode has neither operands in registers nor transposed
        references: there, two buffers of this warpgroup, (rows, K) and (K, tokens).
    """
    if spare:
        left, right = spare
        left[...] = a
        right[...] = b[...].T
        plgpu.wgmma(acc, left, right)
    else:
        plgpu.wgmma(acc, a, transpose_ref(b))


def multiply_onto(y: Any, a: Any, b: Any, native: bool) -> Any:
    """`y + a @ b.T`, of values in the accumulators' layout; waits for it.

    Args:
      y: (rows, tokens) float32.
      a, b: (rows, K) and (tokens, K) of 16 bits, in shared memory.
      native: for a GPU, not for interpret mode.
    """
    if not native:
        return y + a[...].astype(y.dtype) @ b[...].astype(y.dtype).T

    def run(acc: Any) -> None:
        plgpu.wgmma(acc, a, transpose_ref(b))
        plgpu.wgmma_wait(0)

    start = plgpu.ACC.init(y)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_state(run)(start)


def spare_operands(groups: int, rows: int, columns: int, tokens: int, dtype: Any) -> list[Any]:
    """What `multiply` needs in interpret mode, for every warpgroup."""
    return [
        plgpu.SMEM((groups, rows, columns), dtype),
        plgpu.SMEM((groups, columns, tokens), dtype),
    ]


__all__ = [
    "accumulator",
    "interpret_params",
    "load",
    "multiply",
    "pl",
    "plgpu",
    "product_kernel",
    "read",
    "spare_operands",
    "store_transposed",
    "tiled",
    "transpose_ref",
    "whole",
    "whole_tiles",
]
