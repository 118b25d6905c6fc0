"""The few layers every component is built from.

Weights keep the layout in which checkpoints store them: (out, in) for a linear, (O, I, kh, kw) for
a convolution. Conversion then only renames and stacks rows, and a product contracts the last axis
of both operands, which is the K-major form that 8-bit tensor cores require.

Each `nnx.Param` carries the logical names of its axes in its metadata `axes`;
`flux_jax.sharding` maps them to mesh axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.inputs import Branch, Hidden, Input, check_width, dense, layer_norm, surround
from flux_jax.partition import product_on_mesh

Axes = tuple[str | None, ...]
DType = Any


class ShapesOnly(nnx.Rngs):
    """In place of keys where only a module's shapes are wanted: nothing is drawn.

    Tracing what draws, and counting keys, took most of the time of building FLUX.1-dev's modules.
    """


def param(init: Any, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DType, axes: Axes) -> nnx.Param:
    """A parameter drawn by `init`, with logical axis names.

    Drawn in float32 and rounded once, so that a bf16 model is the rounding of the fp32 one.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} name {len(axes)} dimensions, shape is {shape}")
    if isinstance(rngs, ShapesOnly):
        return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
    return nnx.Param(init(rngs.params(), shape, jnp.float32).astype(dtype), axes=axes)


def weight_axes(weight: nnx.Param) -> Axes:
    """The logical names of a matrix's two dimensions, None where it has none."""
    return weight.get_metadata().get("axes", (None, None))


def truncated_fan_in(fan_in: int) -> Any:
    """Truncated normal of standard deviation 1 / sqrt(fan_in)."""
    return jax.nn.initializers.truncated_normal(1.0 / math.sqrt(fan_in))


def along_last(vector: Float[Array, " C"], ndim: int) -> Float[Array, "*one C"]:
    """`vector` with leading axes of one, so that it broadcasts over the last of `ndim` axes."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


class AnyLinear(nnx.Module):
    """What a block may ask of a linear, whatever its weight is kept as.

    A block states what surrounds a product: how its input comes about (`flux_jax.inputs`), and that
    the result is gated and added to a residual stream. Each kind of linear computes together what
    pays for it. `ternary` swaps the module, and `lora` wraps it; the block does not know.
    """

    def __call__(
        self,
        x: Input,
        *,
        gate: Float[Array, "B N"] | None = None,
        residual: Float[Array, "*L N"] | None = None,
        branch: Branch | None = None,
    ) -> Float[Array, "*L N"]:
        """`residual + gate * (x @ weight.T + bias)`, or without the two.

        A branch is part of what is multiplied by the gate.

        Args:
          x: (..., in_features), or a statement of it.
          gate: one vector for each of the first axis of x; with `residual`.
          residual: (..., out_features); with `gate`.
          branch: a summand beside the bias.

        Returns:
          (..., out_features).
        """
        raise NotImplementedError

    def hidden(self, x: Input, start: int = 0, *, branch: Branch | None = None) -> Hidden:
        """`gelu(self(x)[..., start:])`, for the next linear; the columns before as they are.

        The GELU is left to whoever reads the result, or computed with the product.
        """
        return Hidden(self(x, branch=branch), start)

    def apart(
        self, x: Input, start: int, *, branch: Branch | None = None
    ) -> tuple[Float[Array, "*L _"], Hidden]:
        """`hidden(x, start)`, with the columns before `start` as an array of their own.

        Two products where that is possible, so that the first one's result can be sent to other
        devices while the second is computed. Where not, the first array has all columns.
        """
        hidden = self.hidden(x, start, branch=branch)
        return hidden.array, hidden


class Linear(AnyLinear):
    """`y = x @ weight.T + bias`; the one linear of every block.

    Attributes:
      weight: (out_features, in_features).
      bias: (out_features,) or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        axes: Axes = (None, None),
        init: Any = None,
        dtype: DType = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        init = truncated_fan_in(in_features) if init is None else init
        self.weight = param(init, rngs, (out_features, in_features), dtype, axes)
        zeros = jax.nn.initializers.zeros
        self.bias = param(zeros, rngs, (out_features,), dtype, axes[:1]) if bias else None

    def __call__(
        self,
        x: Input,
        *,
        gate: Float[Array, "B N"] | None = None,
        residual: Float[Array, "*L N"] | None = None,
        branch: Branch | None = None,
    ) -> Float[Array, "*L N"]:
        """See `AnyLinear`; in the weight's dtype, accumulating in float32."""
        return surround(self._product(dense(x), slice(None), branch), gate, residual)

    def apart(
        self, x: Input, start: int, *, branch: Branch | None = None
    ) -> tuple[Float[Array, "*L _"], Hidden]:
        """See `AnyLinear`."""
        x = dense(x)
        first, rest = (
            self._product(x, part, branch) for part in (slice(start), slice(start, None))
        )
        return first, Hidden(rest)

    def _product(
        self, x: Float[Array, "*L K"], outputs: slice, branch: Branch | None
    ) -> Float[Array, "*L N"]:
        def product(x: Array, weight: Array) -> Array:
            return jax.lax.dot_general(x, weight[outputs], (((x.ndim - 1,), (1,)), ((), ())))

        weight = self.weight[...]
        check_width(x, weight.shape[1])
        y = product_on_mesh(product, x.astype(weight.dtype), weight, weight_axes(self.weight))
        if self.bias is not None:
            y = y + along_last(self.bias[...][outputs], y.ndim)
        if branch is None:
            return y
        # In its own type: of float32, the largest array there is would be twice as large.
        return y + (branch.narrow(x) @ branch.b[outputs].T).astype(y.dtype)


# Up to this many rows, the gradient of a look-up is a product with one-hot rows. A scatter adds
# one token after another into the same few rows, padding above all: on an H200 it took 240 of the
# 280 milliseconds of the tiny model's training step.
_ONE_HOT_ROWS = 4096


@jax.custom_vjp
def lookup(table: Float[Array, "V C"], ids: Int[Array, "*B"]) -> Float[Array, "*B C"]:
    """Rows of `table` by index."""
    return jnp.take(table, ids, axis=0)


def _lookup_forward(table: Any, ids: Any) -> tuple[Any, Any]:
    return lookup(table, ids), (ids, table)


def _lookup_backward(residuals: Any, grad: Any) -> tuple[Any, None]:
    ids, table = residuals
    rows, width = table.shape
    ids, grad = ids.reshape(-1), grad.reshape(-1, width)
    if rows > _ONE_HOT_ROWS:
        return jnp.zeros_like(table).at[ids].add(grad), None
    one_hot = jax.nn.one_hot(ids, rows, dtype=grad.dtype, axis=0)
    summed = jax.lax.dot(one_hot, grad, preferred_element_type=jnp.float32)
    return summed.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


class Embedding(nnx.Module):
    """Rows of a table, `weight` (num_embeddings, features), by index."""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        axes: Axes = ("vocab", "embed"),
        stddev: float = 0.02,
        dtype: DType = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.normal(stddev)
        self.weight = param(init, rngs, (num_embeddings, features), dtype, axes)

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B C"]:
        return lookup(self.weight[...], ids)


class LayerNorm(nnx.Module):
    """LayerNorm with scale `weight` and `bias`, both (features,), computed in float32."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        dtype: DType = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.weight = param(jax.nn.initializers.ones, rngs, (features,), dtype, ("embed",))
        self.bias = param(jax.nn.initializers.zeros, rngs, (features,), dtype, ("embed",))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        normed = layer_norm(x.astype(jnp.float32), self.eps)
        weight = along_last(self.weight[...].astype(jnp.float32), x.ndim)
        bias = along_last(self.bias[...].astype(jnp.float32), x.ndim)
        return (normed * weight + bias).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*B C"], scale: Float[Array, " C"], eps: float
) -> Float[Array, "*B C"]:
    """`x / rms(x) * scale`, in float32 up to the product with `scale`; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * along_last(scale.astype(x.dtype), x.ndim)


class Conv2d(nnx.Module):
    """2-D convolution over (B, H, W, C) with an (O, I, kh, kw) weight.

    Attributes:
      padding: zero rows/columns ((top, bottom), (left, right)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
        init: Any = None,
        dtype: DType = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        same = (kernel_size // 2, kernel_size // 2)
        self.padding = (same, same) if padding is None else padding
        self.stride = stride
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        fan_in = in_channels * kernel_size * kernel_size
        init = truncated_fan_in(fan_in) if init is None else init
        self.weight = param(init, rngs, shape, dtype, ("conv_out", "conv_in", None, None))
        zeros = jax.nn.initializers.zeros
        self.bias = param(zeros, rngs, (out_channels,), dtype, ("conv_out",))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo Co"]:
        weight = self.weight[...]
        y = jax.lax.conv_general_dilated(
            x.astype(weight.dtype),
            weight,
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return y + along_last(self.bias[...], y.ndim)


class GroupNorm(nnx.Module):
    """GroupNorm over (B, H, W, C) with scale `weight` and `bias`, computed in float32."""

    def __init__(
        self,
        num_groups: int,
        channels: int,
        *,
        eps: float = 1e-6,
        dtype: DType = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        if channels % num_groups:
            raise ValueError(f"channels {channels} must be a multiple of num_groups {num_groups}")
        self.num_groups = num_groups
        self.eps = eps
        self.weight = param(jax.nn.initializers.ones, rngs, (channels,), dtype, ("conv_out",))
        self.bias = param(jax.nn.initializers.zeros, rngs, (channels,), dtype, ("conv_out",))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        grouped = x.astype(jnp.float32).reshape(batch, height * width, self.num_groups, -1)
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        centred = grouped - mean
        variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        scale = along_last(self.weight[...].astype(jnp.float32), x.ndim)
        bias = along_last(self.bias[...].astype(jnp.float32), x.ndim)
        return (normed * scale + bias).astype(x.dtype)
