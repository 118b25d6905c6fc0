"""The FLUX.1 transformer, after `src/flux/model.py` and `modules/layers.py` of Black Forest Labs.

Attribute names are the reference's, so a parameter's path is its name in `flux1-dev.safetensors`,
but for two kinds of place where the reference has an anonymous sequence (marked `# BFL:`).

The modulation vectors depend on the time, the guidance and the pooled prompt alone. They are
computed apart from the blocks (`modulations`), so that a sampler can compute them for all steps
before its loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flux_jax.arguments import check_shapes
from flux_jax.attention import Implementation, attention, is_fused
from flux_jax.configs import FluxConfig
from flux_jax.heads import HeadsBackend, ProjectedHeads, QKNorm
from flux_jax.inputs import GATED, Input, Joined, Modulated
from flux_jax.layers import DType, Linear
from flux_jax.partition import constrain
from flux_jax.rope import Rotation, rotary_angles, sinusoidal_embedding
from flux_jax.sequence import Exchange, exchange_here, is_split, over_all_tokens
from flux_jax.sharding import mesh_of

_TIME_CHANNELS = 256
# Of the residual streams: examples over devices. Without it the compiler may rather split the
# width, as the weights are, and move activations where it should gather weights.
_STREAM = ("batch", None, None)
# What a recomputed block keeps for its gradient.
_KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(GATED), is_fused
)


class Modulations(NamedTuple):
    """Shift, scale and gate vectors of every block for one time step.

    Attributes:
      double: for each double block (image, text), each (B, 6, C): shift, scale, gate before the
        attention, then before the MLP.
      single: for each single block (B, 3, C): shift, scale, gate.
      final: (B, 2, C): shift, scale.
    """

    double: tuple[tuple[Float[Array, "B 6 C"], Float[Array, "B 6 C"]], ...]
    single: tuple[Float[Array, "B 3 C"], ...]
    final: Float[Array, "B 2 C"]


class MLPEmbedder(nnx.Module):
    """Two linears with a SiLU between: an input vector to the width of the model."""

    def __init__(self, in_dim: int, hidden_dim: int, *, dtype: DType, rngs: nnx.Rngs):
        self.in_layer = Linear(in_dim, hidden_dim, axes=("embed", None), dtype=dtype, rngs=rngs)
        self.out_layer = Linear(
            hidden_dim, hidden_dim, axes=("embed", None), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B K"]) -> Float[Array, "B C"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class SelfAttention(nnx.Module):
    """The parameters of one stream's attention; the streams are joined by the block."""

    def __init__(self, config: FluxConfig, *, dtype: DType, rngs: nnx.Rngs):
        width = config.hidden_size
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, axes=("heads", "embed"), **kwargs)
        self.norm = QKNorm(config.head_dim, **kwargs)
        self.proj = Linear(width, width, axes=("embed", "heads"), **kwargs)


class MLP(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, config: FluxConfig, *, dtype: DType, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        # BFL: img_mlp.0 and img_mlp.2
        self.in_layer = Linear(
            config.hidden_size, config.mlp_hidden, axes=("mlp", "embed"), **kwargs
        )
        self.out_layer = Linear(
            config.mlp_hidden, config.hidden_size, axes=("embed", "mlp"), **kwargs
        )

    def __call__(
        self, x: Input, gate: Float[Array, "B C"], residual: Float[Array, "B L C"]
    ) -> Float[Array, "B L C"]:
        """`residual + gate * mlp(x)`."""
        return self.out_layer(self.in_layer.hidden(x), gate=gate, residual=residual)


class Modulation(nnx.Module):
    """A vector to `count` modulation vectors."""

    def __init__(self, config: FluxConfig, count: int, *, dtype: DType, rngs: nnx.Rngs):
        self.count = count
        width = config.hidden_size
        self.lin = Linear(width, count * width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, vec: Float[Array, "B C"]) -> Float[Array, "B count C"]:
        return self.lin(jax.nn.silu(vec)).reshape(vec.shape[0], self.count, -1)


class DoubleStreamBlock(nnx.Module):
    """Image and text streams with their own weights, joined in one attention.

    Attributes:
      attention: which implementation; None for the default.
      heads_backend: what prepares it; None for the kernel where it can run.
    """

    def __init__(self, config: FluxConfig, *, dtype: DType, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.num_heads = config.num_heads
        self.attention: Implementation | None = None
        self.heads_backend: HeadsBackend | None = None
        self.img_mod = Modulation(config, 6, **kwargs)
        self.img_attn = SelfAttention(config, **kwargs)
        self.img_mlp = MLP(config, **kwargs)
        self.txt_mod = Modulation(config, 6, **kwargs)
        self.txt_attn = SelfAttention(config, **kwargs)
        self.txt_mlp = MLP(config, **kwargs)

    def __call__(
        self,
        img: Float[Array, "B I C"],
        txt: Float[Array, "B T C"],
        mods: tuple[Float[Array, "B 6 C"], Float[Array, "B 6 C"]],
        rotation: Rotation,
    ) -> tuple[Float[Array, "B I C"], Float[Array, "B T C"]]:
        """One block.

        Args:
          img, txt: the two streams.
          mods: the block's entry of `Modulations.double`.
          rotation: angles of all T + I positions, text first.

        Returns:
          The two streams.
        """
        (i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2) = _rows(mods[0])
        (t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2) = _rows(mods[1])

        img_qkv = self.img_attn.qkv(Modulated(img, i_shift1, i_scale1))
        txt_qkv = self.txt_attn.qkv(Modulated(txt, t_shift1, t_scale1))
        streams = ((txt_qkv, self.txt_attn.norm), (img_qkv, self.img_attn.norm))
        heads = ProjectedHeads(
            streams=streams,
            rotation=rotation,
            num_heads=self.num_heads,
            backend=self.heads_backend,
        )
        attend = functools.partial(attention, implementation=self.attention)
        attended, _ = over_all_tokens(attend, heads)
        attended = attended.reshape(*attended.shape[:2], -1)
        txt_length = txt.shape[1]

        img = self.img_attn.proj(attended[:, txt_length:], gate=i_gate1, residual=img)
        img = self.img_mlp(Modulated(img, i_shift2, i_scale2), i_gate2, img)
        txt = self.txt_attn.proj(attended[:, :txt_length], gate=t_gate1, residual=txt)
        txt = self.txt_mlp(Modulated(txt, t_shift2, t_scale2), t_gate2, txt)
        return img, txt


class SingleStreamBlock(nnx.Module):
    """Text and image in one sequence; attention and MLP side by side.

    Attributes:
      attention: which implementation; None for the default.
      heads_backend: what prepares it; None for the kernel where it can run.
    """

    def __init__(self, config: FluxConfig, *, dtype: DType, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.attention: Implementation | None = None
        self.heads_backend: HeadsBackend | None = None
        self.linear1 = Linear(width, 3 * width + config.mlp_hidden, axes=("mlp", "embed"), **kwargs)
        self.linear2 = Linear(width + config.mlp_hidden, width, axes=("embed", "mlp"), **kwargs)
        self.norm = QKNorm(config.head_dim, **kwargs)
        self.modulation = Modulation(config, 3, **kwargs)

    def __call__(
        self, x: Float[Array, "B L C"], mods: Float[Array, "B 3 C"], rotation: Rotation
    ) -> Float[Array, "B L C"]:
        """One block over the joined sequence, text first."""
        shift, scale, gate = _rows(mods)
        width = x.shape[-1]
        attend = functools.partial(attention, implementation=self.attention)
        modulated = Modulated(x, shift, scale)
        if is_split():
            # The MLP's part is computed while the other one is on its way.
            qkv, hidden = self.linear1.apart(modulated, start=3 * width)
        else:
            # One product fills the multiprocessors better than two.
            hidden = self.linear1.hidden(modulated, start=3 * width)
            qkv = hidden.array
        heads = ProjectedHeads(
            streams=[(qkv, self.norm)],
            rotation=rotation,
            num_heads=self.num_heads,
            backend=self.heads_backend,
        )
        attended, hidden = over_all_tokens(attend, heads, meanwhile=hidden)
        return self.linear2(Joined(attended.reshape(x.shape), hidden), gate=gate, residual=x)


class LastLayer(nnx.Module):
    """Modulated norm and the projection to image tokens."""

    def __init__(self, config: FluxConfig, *, dtype: DType, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = config.hidden_size
        self.linear = Linear(width, config.in_channels, axes=(None, "embed"), **kwargs)
        # BFL: final_layer.adaLN_modulation.1
        self.adaLN_modulation = Linear(width, 2 * width, axes=("mlp", "embed"), **kwargs)

    def modulation(self, vec: Float[Array, "B C"]) -> Float[Array, "B 2 C"]:
        """Shift and scale."""
        return self.adaLN_modulation(jax.nn.silu(vec)).reshape(vec.shape[0], 2, -1)

    def __call__(
        self, x: Float[Array, "B I C"], mods: Float[Array, "B 2 C"]
    ) -> Float[Array, "B I in"]:
        return self.linear(Modulated(x, *_rows(mods)))


class FluxTransformer(nnx.Module):
    """Velocity of noisy image tokens, given text, time and guidance.

    Attributes:
      config: the hyper-parameters.
    """

    def __init__(self, config: FluxConfig, *, dtype: DType = jnp.bfloat16, rngs: nnx.Rngs):
        """Random weights; `nnx.eval_shape` gives the shapes alone.

        Args:
          config: the hyper-parameters.
          dtype: of the parameters, and so of the computation.
          rngs: source of the `params` stream.
        """
        self.config = config
        width = config.hidden_size
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.img_in = Linear(config.in_channels, width, axes=("embed", None), **kwargs)
        self.time_in = MLPEmbedder(_TIME_CHANNELS, width, **kwargs)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width, **kwargs)
        self.guidance_in = (
            MLPEmbedder(_TIME_CHANNELS, width, **kwargs) if config.guidance_embed else None
        )
        self.txt_in = Linear(config.context_in_dim, width, axes=("embed", None), **kwargs)
        self.double_blocks = nnx.List(
            [DoubleStreamBlock(config, **kwargs) for _ in range(config.depth)]
        )
        self.single_blocks = nnx.List(
            [SingleStreamBlock(config, **kwargs) for _ in range(config.depth_single_blocks)]
        )
        self.final_layer = LastLayer(config, **kwargs)

    @property
    def dtype(self) -> np.dtype:
        """The type of the parameters, and so of the computation."""
        return self._any.dtype

    @property
    def device(self) -> jax.Device:
        """Where the parameters are; on a mesh, one of its devices."""
        return next(iter(self._any.devices()))

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the parameters lie on, if they are a mesh."""
        return mesh_of(self._any)

    @property
    def _any(self) -> Any:
        # A bias: any weight may be packed (`ternary`).
        assert self.img_in.bias is not None
        return self.img_in.bias.get_value()

    def conditioning(
        self,
        timesteps: Float[Array, " B"],
        y: Float[Array, "B P"],
        guidance: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B C"]:
        """The vector that modulates every block.

        Args:
          timesteps: noise level t in [0, 1], 1 for pure noise.
          y: pooled text embedding.
          guidance: guidance scale; required by a model with `guidance_embed`, refused by others.

        Raises:
          ValueError: if guidance is missing, or given to a model without `guidance_embed`.
        """
        if (guidance is None) == self.config.guidance_embed:
            wanted = "needs" if self.config.guidance_embed else "does not take"
            raise ValueError(f"this model {wanted} a guidance scale, got guidance={guidance}")
        vec = self.time_in(sinusoidal_embedding(timesteps, _TIME_CHANNELS))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(sinusoidal_embedding(guidance, _TIME_CHANNELS))
        return constrain(vec + self.vector_in(y), ("batch", None))

    def modulations(self, vec: Float[Array, "B C"], *, remat: bool = False) -> Modulations:
        """Every block's modulation vectors for one conditioning vector.

        Args:
          vec: from `conditioning`.
          remat: recompute them in the gradient: where weights are gathered or unpacked to be used,
            those of all blocks, a quarter of the model, would be kept for it.
        """
        wrap = jax.checkpoint if remat else (lambda module: module)
        return Modulations(
            double=tuple((wrap(b.img_mod)(vec), wrap(b.txt_mod)(vec)) for b in self.double_blocks),
            single=tuple(wrap(b.modulation)(vec) for b in self.single_blocks),
            final=self.final_layer.modulation(vec),
        )

    def velocity(
        self,
        img: Float[Array, "B I in"],
        img_ids: Int[Array, "I A"],
        txt: Float[Array, "B T K"],
        txt_ids: Int[Array, "T A"],
        mods: Modulations,
        *,
        remat: bool = False,
        on_block: Callable[[Float[Array, "B L C"]], None] | None = None,
    ) -> Float[Array, "B I in"]:
        """The velocity, from modulations computed beforehand.

        Args:
          img: noisy image tokens (2 x 2 latent patches).
          img_ids, txt_ids: positions of the tokens.
          txt: T5 embeddings.
          mods: from `modulations`.
          remat: recompute each block in the gradient instead of keeping its activations, but for
            gated products and cuDNN's attention.
          on_block: called, while tracing, with each block's output, text first: what a
            distillation compares.
        """
        rotation = rotary_angles(
            jnp.concatenate((txt_ids, img_ids), axis=0), self.config.axes_dim, self.config.theta
        )

        def run(block: nnx.Module, *inputs: Any) -> Any:
            graphdef, state = nnx.split(block)
            call = functools.partial(_run_block, graphdef, exchange_here())
            return (jax.checkpoint(call, policy=_KEPT) if remat else call)(state, *inputs)

        img, txt = constrain(self.img_in(img), _STREAM), constrain(self.txt_in(txt), _STREAM)
        for block, block_mods in zip(self.double_blocks, mods.double, strict=True):
            img, txt = run(block, img, txt, block_mods, rotation)
            img, txt = constrain(img, _STREAM), constrain(txt, _STREAM)
            if on_block is not None:
                on_block(jnp.concatenate((txt, img), axis=1))
        x = jnp.concatenate((txt, img), axis=1)
        for block, block_mods in zip(self.single_blocks, mods.single, strict=True):
            x = constrain(run(block, x, block_mods, rotation), _STREAM)
            if on_block is not None:
                on_block(x)
        return self.final_layer(x[:, txt.shape[1] :], mods.final)

    def __call__(
        self,
        img: Float[Array, "B I in"],
        img_ids: Int[Array, "I A"],
        txt: Float[Array, "B T K"],
        txt_ids: Int[Array, "T A"],
        timesteps: Float[Array, " B"],
        y: Float[Array, "B P"],
        guidance: Float[Array, " B"] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "B I in"]:
        """Velocity `noise - image` of the flow at (img, t).

        Args:
          img: noisy image tokens.
          img_ids: their (index, row, column), `rope.image_ids`.
          txt: T5 embeddings, padding included.
          txt_ids: their positions, `rope.text_ids`.
          timesteps: noise level t in [0, 1].
          y: pooled CLIP embedding.
          guidance: guidance scale, for a guidance-distilled model.
          remat: recompute blocks in the gradient.

        Returns:
          (B, I, in_channels), in the parameters' dtype.

        Raises:
          ValueError: an argument of another rank, width or batch, or guidance as in `conditioning`.
        """
        given = {"img": img, "img_ids": img_ids, "txt": txt, "txt_ids": txt_ids}
        given |= {"timesteps": timesteps, "y": y, "guidance": guidance}
        check_inputs(self.config, given)
        vec = self.conditioning(timesteps, y, guidance)
        mods = self.modulations(vec, remat=remat)
        return self.velocity(img, img_ids, txt, txt_ids, mods, remat=remat)


def check_inputs(config: FluxConfig, given: Mapping[str, Any]) -> None:
    """See that a transformer's inputs fit it and each other: left alone, some would broadcast.

    Args:
      config: of the transformer.
      given: the arguments of its call by name; what is None or absent is not looked at.

    Raises:
      ValueError: one of another rank, width or batch.
    """
    axes = len(config.axes_dim)
    expected = {
        "img": ("batch", "image tokens", config.in_channels),
        "img_ids": ("image tokens", axes),
        "txt": ("batch", "text tokens", config.context_in_dim),
        "txt_ids": ("text tokens", axes),
        "timesteps": ("batch",),
        "y": ("batch", config.vec_in_dim),
        "guidance": ("batch",),
    }
    check_shapes(given, expected)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(graphdef: Any, exchange: Exchange | None, state: Any, *inputs: Any) -> Any:
    """A block, traced and lowered once for all blocks of its structure, which the compiler inlines.

    Of 57 blocks of FLUX.1 all but the first of each kind cost no more than a call. What attention
    finds of `exchange` while it is traced is not in the shapes: text and image are one sequence.
    """
    del exchange
    return nnx.merge(graphdef, state)(*inputs)


def _rows(mods: Float[Array, "B N C"]) -> tuple[Float[Array, "B C"], ...]:
    return tuple(mods[:, i] for i in range(mods.shape[1]))
