"""The text tower of CLIP, after `CLIPTextModel` of transformers (`models/clip/modeling_clip.py`).

FLUX.1 reads its pooled output alone: the final state of the end-of-text token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.attention import attention
from flux_jax.configs import CLIPTextConfig
from flux_jax.errors import UserError
from flux_jax.layers import DType, Embedding, LayerNorm, Linear

# Configurations from before transformers' pull request 24773 carry this wrong id; FLUX.1's does.
_LEGACY_EOS_TOKEN_ID = 2


def _quick_gelu(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu}


class CLIPTextOutput(NamedTuple):
    """What the text tower returns.

    Attributes:
      last_hidden_state: (B, T, C), after the final norm.
      pooled: (B, C), its row at the end-of-text token.
    """

    last_hidden_state: Float[Array, "B T C"]
    pooled: Float[Array, "B C"]


class CLIPAttention(nnx.Module):
    """Causal self-attention with biases."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        into: Any = dict(axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.q = Linear(width, width, **into)
        self.k = Linear(width, width, **into)
        self.v = Linear(width, width, **into)
        self.out = Linear(width, width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        batch, length, width = x.shape
        q, k, v = (
            linear(x).reshape(batch, length, self.num_heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        # Named, since 77 tokens gain nothing from cuDNN and an odd length is a case to avoid there.
        mixed = attention(q, k, v, causal=True, implementation="xla")
        return self.out(mixed.reshape(batch, length, width))


class CLIPMLP(nnx.Module):
    """Two linears with `hidden_act` between, which is evaluated in float32."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        width, hidden = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(width, hidden, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        hidden = _ACTIVATIONS[self.activation](self.fc1(x).astype(jnp.float32))
        return self.fc2(hidden.astype(x.dtype))


class CLIPBlock(nnx.Module):
    """Self-attention and MLP, each behind a layer norm and added to the stream."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = LayerNorm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = CLIPAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = CLIPMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CLIPTextEncoder(nnx.Module):
    """Token ids to one embedding a token and one a prompt.

    Attributes:
      token_embedding: `weight` (vocab_size, hidden_size).
      position_embedding: `weight` (max_position_embeddings, hidden_size), learned.
      blocks: the layers, in order.
    """

    def __init__(self, config: CLIPTextConfig, *, dtype: DType = jnp.bfloat16, rngs: nnx.Rngs):
        """Builds the tower.

        Args:
          config: sizes.
          dtype: of the parameters, hence of the computation.
          rngs: `params` stream.

        Raises:
          UserError: unknown `hidden_act`, or heads that do not divide the width.
        """
        if config.hidden_act not in _ACTIVATIONS:
            raise UserError(
                f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}"
            )
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"hidden_size must be a multiple of num_attention_heads, got "
                f"{config.hidden_size} and {config.num_attention_heads}"
            )
        self.config = config
        width = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embedding = Embedding(
            config.max_position_embeddings, width, axes=(None, "embed"), dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List(
            CLIPBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )
        self.final_norm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T C"]:
        """Token plus position embeddings.

        Raises:
          ValueError: more tokens than learned positions.
        """
        length = ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"ids has {length} tokens, the model has {self.config.max_position_embeddings} "
                "positions; truncate the prompt"
            )
        positions = jnp.arange(length, dtype=jnp.int32)
        return self.token_embedding(ids) + self.position_embedding(positions)[None]

    def end_positions(self, ids: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Index of each prompt's first end-of-text token.

        With the legacy `eos_token_id` 2 it is taken to be the largest id, as it is in CLIP's own
        vocabulary; with any other, the id itself is looked for (0 when absent, as upstream).
        """
        eos = self.config.eos_token_id
        marks = ids if eos == _LEGACY_EOS_TOKEN_ID else (ids == eos).astype(jnp.int32)
        return jnp.argmax(marks, axis=1)

    def __call__(self, ids: Int[Array, "B T"]) -> CLIPTextOutput:
        """Encodes token ids; padding needs no mask, since it follows the end-of-text token.

        Args:
          ids: (B, T) with T at most `max_position_embeddings`.

        Returns:
          Hidden states and pooled embedding, in the parameters' dtype.
        """
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        ends = self.end_positions(ids)
        return CLIPTextOutput(x, jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0])
