"""Whether the parts of a pipeline belong together, and to this process."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flux_jax.autoencoder import Autoencoder
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.latents import PATCH
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompts import TextEncoders
from flux_jax.sharding import MESH_AXES, axis_size
from flux_jax.transformer import FluxTransformer


def check_devices(mesh: jax.sharding.Mesh) -> None:
    """See that a mesh has known axes, and devices of this process alone.

    Raises:
      UserError: some are another's, or an axis that nothing is divided over: all of its devices
        would do the same work.
    """
    unknown = [str(axis) for axis in mesh.axis_names if axis not in MESH_AXES]
    if unknown:
        raise UserError(
            f"a mesh's axes must be of {', '.join(MESH_AXES)} (`flux_jax.make_mesh`), got "
            f"{', '.join(unknown)}"
        )
    if {device.process_index for device in mesh.devices.flat} != {jax.process_index()}:
        raise UserError(
            "a pipeline draws on devices of its own process: give each process a mesh of its own, "
            "as make_mesh(data=2, devices=jax.local_devices()), and its share of the images"
        )


def check_widths(
    transformer: FluxTransformer, vae: Autoencoder, text_encoders: TextEncoders
) -> None:
    """See that the models' widths fit together.

    Raises:
      UserError: a component of another model.
    """
    config = transformer.config
    widths = [("vae", "in_channels", vae.config.latent_channels * PATCH**2)]
    if text_encoders.text_encoder is not None:
        width = text_encoders.text_encoder.config.hidden_size
        widths.append(("text_encoder", "vec_in_dim", width))
    if text_encoders.text_encoder_2 is not None:
        width = text_encoders.text_encoder_2.config.d_model
        widths.append(("text_encoder_2", "context_in_dim", width))
    for component, field, width in widths:
        if width != getattr(config, field):
            raise UserError(
                f"{component} gives {width} channels where the transformer's {field} is "
                f"{getattr(config, field)}: they do not belong together"
            )


def check_embeds(
    name: str, embeds: PromptEmbeds, config: FluxConfig, mesh: jax.sharding.Mesh | None = None
) -> None:
    """See that encoded prompts are as wide as the transformer reads them, finite, and divisible.

    Args:
      name: of the argument.
      embeds: the prompts.
      config: of the transformer.
      mesh: that it lies on, if it does.

    Raises:
      UserError: they are of another model, are not finite, or have tokens that the mesh cannot
        divide.
    """
    found = embeds.prompt_embeds.shape[-1], embeds.pooled_prompt_embeds.shape[-1]
    expected = config.context_in_dim, config.vec_in_dim
    if found != expected:
        raise UserError(
            f"{name} was encoded for another model: its embeddings are {found[0]} and {found[1]} "
            f"wide, this transformer's context_in_dim and vec_in_dim are {expected[0]} and "
            f"{expected[1]}"
        )
    if not (_is_finite(embeds.prompt_embeds) and _is_finite(embeds.pooled_prompt_embeds)):
        raise UserError(f"{name} must have finite embeddings, got NaN or infinity in them")
    tokens = embeds.prompt_embeds.shape[1]
    pieces = 1 if mesh is None else axis_size(mesh, "sequence")
    if tokens % pieces:
        raise UserError(
            f"the mesh's sequence={pieces} does not divide the {tokens} text tokens of {name}: "
            "encode it with another max_sequence_length"
        )


@jax.jit
def _is_finite(array: Float[Any, "P ..."]) -> Bool[Array, ""]:
    return jnp.isfinite(array).all()


def encoded_length(embeds: PromptEmbeds, requested: int | None) -> int:
    """The T5 tokens of encoded prompts.

    Raises:
      UserError: another number was asked for.
    """
    tokens = embeds.prompt_embeds.shape[1]
    if requested not in (None, tokens):
        raise UserError(
            f"max_sequence_length must be {tokens}, with which prompt was encoded, or be left out; "
            f"got {requested}"
        )
    return tokens


def check_same_length(tokens: int, negative: PromptEmbeds) -> None:
    """See that a negative prompt that was encoded before has as many tokens as the prompt.

    One number of them is in an image's record, and one program draws with both.

    Raises:
      UserError: it has not.
    """
    others = negative.prompt_embeds.shape[1]
    if tokens != others:
        raise UserError(
            f"negative_prompt was encoded to {others} tokens and prompt to {tokens}: encode both "
            "with the same max_sequence_length"
        )
