"""What happens to a tile of sums in registers, on Hopper, before it is written."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_api import load, pl, plgpu, read, transpose_ref
from pallas_kernels.operands import Operands
from pallas_kernels.reference import GELU_CUBIC, GELU_SLOPE

LAYOUT = plgpu.Layout.WGMMA


class Window(NamedTuple):
    """Which part of the result a warpgroup computes.

    Attributes:
      output, token: where it starts.
      shape: (outputs, tokens).
      run: tokens that share a gate; a multiple of the window's, if there is more than one gate.
      native: for a GPU, not for interpret mode.
    """

    output: Any
    token: Any
    shape: tuple[int, int]
    run: int
    native: bool

    def cast(self, value: Any) -> Any:
        """In the accumulators' layout."""
        return plgpu.layout_cast(value, LAYOUT) if self.native else value

    def of_outputs(self, ref: Any) -> Any:
        """(N,) over the window, as float32."""
        at = ref.at[pl.ds(self.output, self.shape[0])]
        return read(at, LAYOUT.reduce(1), self.native).astype(jnp.float32)

    def of_tokens(self, ref: Any) -> Any:
        """(M,) over the window, in its own dtype."""
        at = ref.at[pl.ds(self.token, self.shape[1])]
        return read(at, LAYOUT.reduce(0), self.native)

    def per_output(self, values: Any) -> Any:
        """The window's shape, the same for all tokens."""
        return self.cast(lax.broadcast_in_dim(values, self.shape, (0,)))

    def per_token(self, values: Any) -> Any:
        """The window's shape, the same for all outputs."""
        return self.cast(lax.broadcast_in_dim(values, self.shape, (1,)))

    def ahead(self, ops: Operands) -> Operands:
        """Scales and bias, read before they are needed: `scaled` takes them."""
        return Operands(
            scale=None if ops.scale is None else self.of_outputs(ops.scale),
            bias=None if ops.bias is None else self.of_outputs(ops.bias),
            token_scale=None if ops.token_scale is None else self.of_tokens(ops.token_scale),
        )


def scaled(
    sums: Any,
    ops: Operands,
    window: Window,
    *,
    scale_done: bool,
    ready: Operands | None = None,
) -> Any:
    """Scales and bias.

    Args:
      sums: (outputs, tokens) int32 or float32.
      ops: references.
      scale_done: the weight's scale is in already.
      ready: what `Window.ahead` has read already.

    Returns:
      (outputs, tokens) float32, in the order of operations of `reference`.
    """

    def outputs(read: Any, ref: Any) -> Any:
        return window.per_output(window.of_outputs(ref) if read is None else read)

    def tokens(read: Any, ref: Any) -> Any:
        return window.per_token(window.of_tokens(ref) if read is None else read)

    ready = ready or Operands()
    y = sums
    if ops.row_sum is not None:
        y = y - tokens(None, ops.row_sum)
    y = y.astype(jnp.float32)
    if not scale_done:
        y = y * outputs(ready.scale, ops.scale)
    if ops.token_scale is not None:
        y = y * tokens(ready.token_scale, ops.token_scale)
    if ops.bias is not None:
        y = y + outputs(ready.bias, ops.bias)
    return y


def activated(y: Any, ops: Operands, window: Window, *, gelu: bool) -> Any:
    """GELU and gate, of what `scaled` returns; the residual is left to `add_residual`."""
    if gelu:
        y = tanh_gelu(y)
    if ops.gate is not None:
        gate = window.of_outputs(ops.gate.at[lax.div(window.token, window.run)])
        y = y * window.per_output(gate)
    return y


def add_residual(y: Any, ref: Any, window: Window) -> Any:
    """`y` (outputs, tokens) and the residual (tokens, outputs) of the window; None adds nothing."""
    if ref is None:
        return y
    outputs, tokens = window.shape
    at = ref.at[pl.ds(window.token, tokens), pl.ds(window.output, outputs)]
    if window.native:
        # Pairs of outputs lie side by side in memory, pairs of tokens in the accumulators.
        turned = plgpu.Layout.WGMMA_TRANSPOSED
        values = load(transpose_ref(at), turned, optimized=False)
        return y + plgpu.layout_cast(values.astype(jnp.float32), LAYOUT)
    return y + at[...].T.astype(jnp.float32)


def tanh_gelu(y: Any) -> Any:
    """GELU in its tanh form, as y times a sigmoid (see `reference.GELU_SLOPE`).

    The tensor cores wait for this. The sigmoid is the square of a reciprocal root, for which there
    is one instruction, as there is for the exponential; a division would be ten.
    """
    root = lax.rsqrt(jnp.exp((y + y * y * y * GELU_CUBIC) * -GELU_SLOPE) + 1.0)
    return y * root * root
