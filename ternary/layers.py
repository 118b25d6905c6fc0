"""Linears with ternary weights, which take the place of `flux_jax.layers.Linear` in a block.

Both compute `y = x @ (scale * signs).T [+ (x @ a.T) @ b.T] + bias`; the part in brackets is the
optional 16-bit branch of rank R.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from flux_jax.inputs import (
    Branch,
    Hidden,
    Input,
    check_gated,
    check_width,
    dense,
    joined,
    surround,
)
from flux_jax.layers import AnyLinear, Axes, DType, Linear, weight_axes
from flux_jax.partition import is_gathered, product_on_mesh
from flux_jax.sequence import EXCHANGE_MULTIPROCESSORS
from pallas_kernels import pack_codes, packed_width, unpack_codes
from pallas_kernels.reference import signed_product
from pallas_kernels.rounding import rounded
from ternary.config import QuantConfig, scale_shape
from ternary.fused import Weights, product
from ternary.quantize import (
    Scale,
    dequantize,
    fit_scale,
    low_rank,
    round_scale,
    straight_through_signs,
    straight_through_tokens,
    ternary_signs,
)

# float16's smallest positive number.
_SMALLEST = 2.0**-24


class PackedCodes(nnx.Variable):
    """Stored and placed as parameters; to `nnx.grad` and optimisers none: they have no gradient."""


class TernaryLinear(AnyLinear):
    """A linear whose weight is packed at two bits; for inference.

    Differentiable, in reverse mode (`jax.grad`) and not forwards (`jax.jvp`), in x, scale, bias and
    the low-rank branch.

    Attributes:
      packed: (N, Kp) uint8, the layout of `pallas_kernels.packing`.
      scale: float16 (), (N,) or (N, G).
      bias: (N,) or None.
      low_rank_a, low_rank_b: (R, K) and (N, R), or None.
      in_features: K.
      activation_bits: 16 or 8.
      dtype: of the computation and of the result.
      backend: of `pallas_kernels`; None leaves the choice to it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantConfig,
        *,
        bias: bool = True,
        axes: Axes = (None, None),
        dtype: DType = jnp.bfloat16,
    ):
        """All weights zero; the shapes are what matters (`nnx.eval_shape`), values come later."""
        self.in_features = in_features
        self.activation_bits = config.activation_bits
        self.dtype = jnp.dtype(dtype)
        self.backend: str | None = None
        shape = scale_shape(config.granularity, out_features, in_features)
        width = packed_width(in_features)
        # Every code 1: weight 0.
        self.packed = PackedCodes(jnp.full((out_features, width), 0b01010101, jnp.uint8), axes=axes)
        scale_axes = (axes[0], None)[: len(shape)]
        self.scale = nnx.Param(jnp.zeros(shape, jnp.float16), axes=scale_axes)
        self.bias = nnx.Param(jnp.zeros(out_features, dtype), axes=axes[:1]) if bias else None
        self.low_rank_a, self.low_rank_b = _branch(in_features, out_features, config, axes, dtype)

    @classmethod
    def from_linear(cls, linear: Linear | nnx.Linear, config: QuantConfig) -> TernaryLinear:
        """Round a linear's weight, without training.

        Raises:
          TypeError: no such linear.
        """
        return FakeTernaryLinear.from_linear(linear, config).freeze()

    def dense_weight(self) -> Float[Array, "N K"]:
        """The weight that this layer stands for, low-rank branch included, float32."""
        signs = unpack_codes(self.packed[...], self.in_features).astype(jnp.int8) - 1
        weight = dequantize(signs, self.scale[...])
        if self.low_rank_a is None or self.low_rank_b is None:
            return weight
        return weight + self.low_rank_b[...].astype(jnp.float32) @ self.low_rank_a[...].astype(
            jnp.float32
        )

    def __call__(
        self,
        x: Input,
        *,
        gate: Float[Array, "B N"] | None = None,
        residual: Float[Array, "*L N"] | None = None,
        branch: Branch | None = None,
    ) -> Float[Array, "*L N"]:
        """See `AnyLinear`; in `dtype`, accumulating in float32 (int32 for int8 activations).

        Rounded once, at the end (`ternary.fused`).
        """
        return self._product(x, gate, residual, branch)

    def hidden(self, x: Input, start: int = 0, *, branch: Branch | None = None) -> Hidden:
        """See `AnyLinear`; 16-bit results go through GELU before they are rounded."""
        if self.activation_bits == 8 or start:
            return super().hidden(x, start, branch=branch)
        return Hidden(self._product(x, branch=branch, gelu=True), activated=True)

    def apart(
        self, x: Input, start: int, *, branch: Branch | None = None
    ) -> tuple[Float[Array, "*L _"], Hidden]:
        """See `AnyLinear`."""
        first, rest = slice(start), slice(start, None)
        gelu = self.activation_bits == 16
        hidden = self._product(
            x, branch=branch, gelu=gelu, outputs=rest, leave=EXCHANGE_MULTIPROCESSORS
        )
        return self._product(x, branch=branch, outputs=first), Hidden(hidden, activated=gelu)

    def _weights(self, outputs: slice = slice(None)) -> Weights:
        scale = self.scale[...]
        return Weights(
            self.packed[...][outputs],
            scale[outputs] if scale.ndim else scale,
            None if self.bias is None else self.bias[...][outputs],
        )

    def _product(
        self,
        x: Input,
        gate: Any = None,
        residual: Any = None,
        branch: Branch | None = None,
        gelu: bool = False,
        outputs: slice = slice(None),
        leave: int = 0,
    ) -> Array:
        check_width(x, self.in_features)
        check_gated(gate, residual)
        branch = joined(_own_branch(self), branch)
        return product(
            x,
            self._weights(outputs),
            gate,
            residual,
            None if branch is None else branch.of(outputs),
            activation_bits=self.activation_bits,
            dtype=self.dtype,
            backend=self.backend,
            gelu=gelu,
            leave=leave,
        )


class FakeTernaryLinear(AnyLinear):
    """A linear that is ternary in the forward pass and keeps latent weights; for training.

    Its result is that of the `TernaryLinear` from `freeze`: the same integers are multiplied, as
    floats, and scales and bias are rounded as they will be stored. Only what comes after the sums,
    which the packed layer computes before it rounds, comes after the rounding here: gate and
    residual, and GELU with 16-bit activations. Gradients go straight through both roundings, in
    reverse mode (`jax.grad`) and not forwards (`jax.jvp`).

    Attributes:
      weight: (N, K) latent weights, of any floating dtype.
      log_scale: float32, the logarithm of the scale, (), (N,) or (N, G), where it is learned: the
        scale stays positive, and a step changes it by a fraction. None where the latent weights
        determine it.
      bias, low_rank_a, low_rank_b, in_features: as in `TernaryLinear`.
      config: how it is quantised.
      dtype: of the computation and of the result.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantConfig,
        *,
        bias: bool = True,
        axes: Axes = (None, None),
        dtype: DType = jnp.bfloat16,
        master_dtype: DType = jnp.float32,
    ):
        """All parameters zero; `from_linear` gives them values.

        Args:
          master_dtype: of everything that is trained, but for the learned scale (float32).
        """
        self.in_features = in_features
        self.config = config
        self.dtype = jnp.dtype(dtype)
        shape = scale_shape(config.granularity, out_features, in_features)
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), master_dtype), axes=axes)
        scale_axes = (axes[0], None)[: len(shape)]
        learned = config.learned_scale
        self.log_scale = (
            nnx.Param(jnp.zeros(shape, jnp.float32), axes=scale_axes) if learned else None
        )
        self.bias = (
            nnx.Param(jnp.zeros(out_features, master_dtype), axes=axes[:1]) if bias else None
        )
        branch = _branch(in_features, out_features, config, axes, master_dtype)
        self.low_rank_a, self.low_rank_b = branch

    @classmethod
    def from_linear(
        cls, linear: Linear | nnx.Linear, config: QuantConfig, *, master_dtype: DType = jnp.float32
    ) -> FakeTernaryLinear:
        """Start from a linear's weight, in whose type the new layer computes.

        The scale is the fit of `config`; the low-rank branch starts at the singular value
        decomposition of what the ternary weight leaves.

        Raises:
          TypeError: neither a linear of this project nor Flax's.
        """
        axes: Axes = (None, None)
        if isinstance(linear, nnx.Linear):
            weight = linear.kernel[...].T
        elif isinstance(linear, Linear):
            weight, axes = linear.weight[...], weight_axes(linear.weight)
        else:
            raise TypeError(
                "expected a flux_jax.layers.Linear or a flax.nnx.Linear, got "
                f"{type(linear).__name__}"
            )
        rows, columns = weight.shape
        new = cls(
            columns,
            rows,
            config,
            bias=linear.bias is not None,
            axes=axes,
            dtype=weight.dtype,
            master_dtype=master_dtype,
        )
        new.weight[...] = weight.astype(master_dtype)
        if new.bias is not None and linear.bias is not None:
            new.bias[...] = linear.bias[...].astype(master_dtype)
        scale = fit_scale(weight, config.granularity, config.refit_steps)
        if new.log_scale is not None:
            new.log_scale[...] = jnp.log(jnp.maximum(scale, _SMALLEST))
        if new.low_rank_a is not None and new.low_rank_b is not None:
            left = weight.astype(jnp.float32) - dequantize(ternary_signs(weight, scale), scale)
            a, b = low_rank(left, config.rank)
            new.low_rank_a[...] = a.astype(master_dtype)
            new.low_rank_b[...] = b.astype(master_dtype)
        return new

    def quantization_scale(self) -> Float[Array, "*scale"]:
        """The scale in use, float32, rounded as it is stored; differentiable where learned."""
        if self.log_scale is not None:
            scale = jnp.exp(self.log_scale[...])
            # At 0 no gradient would reach the weight or the scale again.
            scale = scale + jax.lax.stop_gradient(jnp.maximum(_SMALLEST - scale, 0))
            return round_scale(scale)
        latent = jax.lax.stop_gradient(self.weight[...])
        return fit_scale(latent, self.config.granularity, self.config.refit_steps)

    def __call__(
        self,
        x: Input,
        *,
        gate: Float[Array, "B N"] | None = None,
        residual: Float[Array, "*L N"] | None = None,
        branch: Branch | None = None,
    ) -> Float[Array, "*L N"]:
        """As `TernaryLinear`, differentiable in all its floating parameters and in x."""
        check_width(x, self.in_features)
        branch = joined(_own_branch(self), branch)
        if self.config.activation_bits == 8:
            # As the packed layer does it: rounded to int8 alone, not to 16 bits before.
            x = dense(jax.tree.map(lambda array: array.astype(jnp.float32), x))
        else:
            x = dense(x).astype(self.dtype)
        scale = self.quantization_scale()
        # Integers of at most 127 are exact in bf16, and so is everything that is summed.
        axes, gather = weight_axes(self.weight), is_gathered(x)
        signs: Array = straight_through_signs(self.weight[...], scale, axes, gather)
        bias = (
            None if self.bias is None else rounded(self.bias[...].astype(jnp.float32), self.dtype)
        )

        def product(x: Array, signs: Array) -> Array:
            if self.config.activation_bits == 16:
                return signed_product(x, signs, scale, bias)
            q, token_scale = straight_through_tokens(x)
            token_scale = jax.lax.stop_gradient(token_scale)
            return signed_product(q.astype(self.dtype), signs, scale, bias, token_scale)

        y = product_on_mesh(product, x, signs.astype(self.dtype), axes)
        if branch is not None:
            y = y + branch.wide(x)
        return surround(y.astype(self.dtype), gate, residual)

    def freeze(self) -> TernaryLinear:
        """The packed layer with the same result."""
        rows, columns = self.weight.shape
        axes = weight_axes(self.weight)
        new = TernaryLinear(
            columns, rows, self.config, bias=self.bias is not None, axes=axes, dtype=self.dtype
        )
        scale = self.quantization_scale()
        new.packed[...] = _pack(self.weight[...], scale)
        new.scale[...] = scale.astype(jnp.float16)
        for name in ("bias", "low_rank_a", "low_rank_b"):
            value = getattr(self, name)
            if value is not None:
                getattr(new, name)[...] = value[...].astype(self.dtype)
        return new


def trained_dtype(name: str, master_dtype: DType) -> DType:
    """The type of a student's parameter in training: the master dtype, but float32 for a scale.

    Args:
      name: of the parameter, by its path.
      master_dtype: of all others.
    """
    return jnp.float32 if name.rpartition(".")[2] == "log_scale" else master_dtype


@jax.jit
def _pack(weight: Float[Array, "N K"], scale: Scale) -> UInt8[Array, "N Kp"]:
    return pack_codes((ternary_signs(weight, scale) + 1).astype(jnp.uint8))


def _branch(
    in_features: int, out_features: int, config: QuantConfig, axes: Axes, dtype: DType
) -> tuple[Any, Any]:
    """Parameters of the low-rank branch, zero; (None, None) for rank 0."""
    if not config.rank:
        return None, None
    a = jnp.zeros((config.rank, in_features), dtype)
    b = jnp.zeros((out_features, config.rank), dtype)
    return nnx.Param(a, axes=(None, axes[1])), nnx.Param(b, axes=(axes[0], None))


def _own_branch(layer: TernaryLinear | FakeTernaryLinear) -> Branch | None:
    """In the type that the layer computes in."""
    a, b = layer.low_rank_a, layer.low_rank_b
    if a is None or b is None:
        return None
    return Branch(a[...].astype(layer.dtype), b[...].astype(layer.dtype))
