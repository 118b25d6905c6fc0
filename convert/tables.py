"""Which name map and which config translation belong to a component."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from convert.maps import autoencoder, clip, t5, transformer
from convert.maps.fields import read_fields
from convert.rules import Map, Rule
from convert.transforms import Shape
from flux_jax.components import CONFIG_CLASSES, Config, abstract_module
from flux_jax.errors import UserError
from flux_jax.tree import to_flat

_TABLES: dict[str, Any] = {
    "transformer": transformer,
    "text_encoder": clip,
    "text_encoder_2": t5,
    "vae": autoencoder,
}
COMPONENTS = tuple(_TABLES)

# Of tensors that have our names already.
IDENTITY_MAP = Map(name="Flax", rules=(Rule("(.+)", r"\1"),))

# File stems and class names of diffusers folders.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def diffusers_map(component: str, config: Config) -> Map:
    return _TABLES[component].diffusers_map(config)


def single_file_map(component: str, config: Config) -> Map:
    """Black Forest Labs' names; text encoders have Hugging Face's in single files too."""
    table = _TABLES[component]
    return (getattr(table, "bfl_map", None) or table.diffusers_map)(config)


def config_from_hf(component: str, raw: Mapping[str, Any]) -> Config:
    return _TABLES[component].config_from_hf(raw)


def config_to_hf(component: str, config: Config) -> dict[str, Any]:
    return _TABLES[component].config_to_hf(config)


def our_shapes(component: str, config: Config) -> dict[str, Shape]:
    """Shape of every parameter of a component by dotted path."""
    return dict(_our_shapes(component, config))


@functools.lru_cache(maxsize=16)
def _our_shapes(component: str, config: Config) -> tuple[tuple[str, Shape], ...]:
    flat = to_flat(abstract_module(component, config))
    return tuple((name, tuple(value.shape)) for name, value in flat.items())


def config_to_json(config: Any) -> dict[str, Any]:
    """The fields of a config, as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(component: str, raw: Any, *, what: str) -> Config:
    """A component's config from our own fields.

    Raises:
      UserError: a field is missing, unknown or of another type.
    """
    config_class = CONFIG_CLASSES[component]
    if not isinstance(raw, dict):
        raise UserError(f"{what}: expected an object, got {type(raw).__name__}")
    unknown = sorted(raw.keys() - {field.name for field in dataclasses.fields(config_class)})
    if unknown:
        raise UserError(f"{what}: unknown fields {', '.join(unknown)}; written by a newer version?")
    zero = ("eos_token_id",)
    return config_class(**read_fields(raw, config_class, what=what, may_be_zero=zero))


def check_components(names: list[str] | tuple[str, ...]) -> None:
    """Raises:
    UserError: a name that is no component.
    """
    unknown = sorted(set(names) - set(COMPONENTS))
    if unknown:
        raise UserError(
            f"unknown component {', '.join(unknown)}; there are {', '.join(COMPONENTS)}"
        )
