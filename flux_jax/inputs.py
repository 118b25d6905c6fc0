"""What a product reads: activations, or a statement of how they come about.

A block says what surrounds a product (`Modulated`, `Hidden`, `Joined`, and the gate and residual of
a linear's call), and the linear decides what of it is computed together: a bf16 linear leaves it to
XLA, a ternary one has kernels. `dense` is what every statement means. A LoRA adds a `Branch`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.reference import float_product

# Of the modulated norms.
EPS = 1e-6
# A gated product, to `jax.checkpoint`. The gate's gradient needs it, and it is as narrow as the
# stream: kept, it spares the gradient two fifths of a block's products.
GATED = "gated"


def layer_norm(x: Float[Array, "*B C"], eps: float) -> Float[Array, "*B C"]:
    """LayerNorm without scale and bias, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def modulate(
    x: Float[Array, "B L C"], shift: Float[Array, "B C"], scale: Float[Array, "B C"]
) -> Float[Array, "B L C"]:
    """`(1 + scale) * layer_norm(x) + shift`, in float32; returns x's dtype."""
    shift, scale = shift.astype(jnp.float32)[:, None, :], scale.astype(jnp.float32)[:, None, :]
    return ((1.0 + scale) * layer_norm(x.astype(jnp.float32), EPS) + shift).astype(x.dtype)


def add_gated(
    x: Float[Array, "B *L C"], gate: Float[Array, "B C"], y: Float[Array, "B *L C"]
) -> Float[Array, "B *L C"]:
    """`x + gate * y`, of any number of axes between the first and the last."""
    return x + gate.reshape(gate.shape[0], *[1] * (y.ndim - 2), -1) * y


def gelu(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """The tanh form of GELU, in float32; returns x's dtype.

    Written with a sigmoid, `(1 + tanh(u)) / 2 = sigmoid(2 u)`: half the instructions of XLA's tanh,
    which weighs where a pass over the MLP's activations should only be bound by memory.
    """
    x32 = x.astype(jnp.float32)
    inner = 2.0 * math.sqrt(2.0 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
    return (x32 * jax.nn.sigmoid(inner)).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modulated:
    """`modulate(x, shift, scale)`."""

    x: Float[Array, "B L C"]
    shift: Float[Array, "B C"]
    scale: Float[Array, "B C"]

    def dense(self) -> Float[Array, "B L C"]:
        """The values, of x's dtype."""
        return modulate(self.x, self.shift, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """The hidden activations of an MLP: `gelu(array[..., start:])`.

    Attributes:
      array: (..., start + F), a product; its columns before `start` are something else.
      start: where the hidden activations begin.
      activated: the product has done the GELU already.
    """

    array: Float[Array, "*B W"]
    start: int = dataclasses.field(default=0, metadata={"static": True})
    activated: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self) -> Float[Array, "*B F"]:
        """The values, of the array's dtype."""
        hidden = self.array[..., self.start :]
        return hidden if self.activated else gelu(hidden)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """`concatenate((first, hidden), -1)`."""

    first: Float[Array, "*B C"]
    hidden: Hidden

    def dense(self) -> Float[Array, "*B K"]:
        """The values, of the arrays' dtype."""
        return jnp.concatenate((self.first, self.hidden.dense()), axis=-1)


Input = Float[Array, "*B K"] | Modulated | Hidden | Joined


def dense(x: Input) -> Float[Array, "*B K"]:
    """The activations that `x` is or stands for."""
    return x.dense() if isinstance(x, Modulated | Hidden | Joined) else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branch:
    """A low-rank summand of a product, beside its weight: `x @ a.T @ b.T`.

    Attributes:
      a: (R, K).
      b: (N, R), of a's dtype.
    """

    a: Float[Array, "R K"]
    b: Float[Array, "N R"]

    def of(self, outputs: slice) -> Branch:
        """The branch of some of the outputs."""
        return Branch(self.a, self.b[outputs])

    def narrow(self, x: Input) -> Float[Array, "*B R"]:
        """`x @ a.T`, in a's dtype, accumulating in float32; joined inputs are not joined for it."""
        if not isinstance(x, Joined):
            return self._product(dense(x), self.a).astype(self.a.dtype)
        width = x.first.shape[-1]
        first = self._product(x.first, self.a[:, :width])
        return (first + self._product(x.hidden.dense(), self.a[:, width:])).astype(self.a.dtype)

    def wide(self, x: Input) -> Float[Array, "*B N"]:
        """`x @ a.T @ b.T`, float32."""
        return self._product(self.narrow(x), self.b)

    def _product(self, x: Float[Array, "*B K"], weight: Float[Array, "R K"]) -> Array:
        return float_product(x.astype(weight.dtype), weight)


def joined(first: Branch | None, second: Branch | None) -> Branch | None:
    """The sum of two branches of one linear, as one; in the first's type."""
    if first is None or second is None:
        return second if first is None else first
    a, b = second.a.astype(first.a.dtype), second.b.astype(first.b.dtype)
    return Branch(jnp.concatenate((first.a, a)), jnp.concatenate((first.b, b), 1))


def surround(
    y: Float[Array, "*L N"],
    gate: Float[Array, "B N"] | None,
    residual: Float[Array, "*L N"] | None,
) -> Float[Array, "*L N"]:
    """`residual + gate * y`, in y's dtype, where they are given."""
    check_gated(gate, residual)
    if gate is None or residual is None:
        return y
    return add_gated(residual, gate, checkpoint_name(y, GATED))


def check_gated(gate: Any, residual: Any) -> None:
    """Raises ValueError if only one of the two is given."""
    if (gate is None) != (residual is None):
        raise ValueError("gate and residual go together: give both, or neither")


def check_width(x: Input, in_features: int) -> None:
    """Raises ValueError if x has not as many inputs as its linear."""
    if isinstance(x, Modulated):
        width = x.x.shape[-1]
    elif isinstance(x, Hidden):
        width = x.array.shape[-1] - x.start
    elif isinstance(x, Joined):
        width = x.first.shape[-1] + x.hidden.array.shape[-1] - x.hidden.start
    else:
        width = x.shape[-1] if x.ndim else 0
    if width != in_features:
        raise ValueError(f"expected {in_features} inputs in the last axis, got {width}")
