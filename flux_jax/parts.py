"""Whether the parts of a pipeline belong together, and to this process."""

from __future__ import annotations

import jax

from flux_jax.autoencoder import Autoencoder
from flux_jax.errors import UserError
from flux_jax.latents import PATCH
from flux_jax.prompts import TextEncoders
from flux_jax.transformer import FluxTransformer


def check_devices(mesh: jax.sharding.Mesh) -> None:
    """See that all devices are this process's.

    Raises:
      UserError: some are another's.
    """
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
