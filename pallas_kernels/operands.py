"""What a product has beside x and the packed weight, from the op to the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


class Operands(NamedTuple):
    """Arrays outside of a kernel, references to them inside; None for what there is not.

    Attributes:
      scale: of the weight: (), (N,) or (N, G); to a Mosaic kernel (N,) or (G, N).
      bias: (N,).
      token_scale: (M,) float32, of int8 activations.
      row_sum: (M,) int32, the sums of int8 activations; to a kernel if it decodes the weight to
        codes.
      gate: (B, N), a factor for each of B equal runs of tokens.
      residual: (M, N), a summand.
      u, v: (M, R) and (N, R); `u @ v.T` is a summand beside the bias.
    """

    scale: Any = None
    bias: Any = None
    token_scale: Any = None
    row_sum: Any = None
    gate: Any = None
    residual: Any = None
    u: Any = None
    v: Any = None

    def given(self) -> list[Any]:
        """What there is, in order."""
        return [value for value in self if value is not None]

    def take(self, refs: list[Any]) -> Operands:
        """References in place of what there is; they are removed from the front of `refs`."""
        return Operands(*(None if value is None else refs.pop(0) for value in self))

    def run(self, tokens: int) -> int:
        """How many of `tokens` share a gate."""
        return tokens if self.gate is None else tokens // len(self.gate)

    def padded(self, tokens: int, outputs: int) -> Operands:
        """With zeros up to `tokens` and `outputs`: kernels read whole tiles of these.

        But of u and v, which the copy engine reads.
        """

        def pad(value: Any, *sizes: int) -> Any:
            if value is None:
                return None
            first = value.ndim - len(sizes)
            more = [(0, 0)] * first + [
                (0, max(size - old, 0))
                for size, old in zip(sizes, value.shape[first:], strict=True)
            ]
            return jnp.pad(value, more) if any(after for _, after in more) else value

        return self._replace(
            scale=pad(self.scale, outputs),
            bias=pad(self.bias, outputs),
            token_scale=pad(self.token_scale, tokens),
            row_sum=pad(self.row_sum, tokens),
            gate=pad(self.gate, outputs),
            residual=pad(self.residual, tokens, outputs),
        )


# Have a row for each row of the result; and for each of several equal runs of its rows.
PER_ROW, PER_RUN = ("token_scale", "row_sum", "residual", "u"), ("gate",)
