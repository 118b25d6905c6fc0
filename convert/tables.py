"""Which name map and which config translation belong to a component."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from convert.maps import autoencoder, clip, t5, transformer
from convert.maps.fields import read_fields
from convert.problems import naming
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
# What is read of a tokenizer's folder.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")

# Of tensors that have our names already.
IDENTITY_MAP = Map(name="Flax", rules=(Rule("{name}", "{name}"),))

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
# Of a component that is quantised: how, in its `config.json`.
QUANTIZATION = "quantization_config"
# Of a transformer that is packed, in the place of its safetensors file.
TERNARY_FILE = "ternary.safetensors"
# What a calibration leaves beside the components.
LATENTS = "latents"


def diffusers_map(component: str, config: Config) -> Map:
    """From the names in the component's folder of a diffusers pipeline to ours."""
    return _TABLES[component].diffusers_map(config)


def single_file_map(component: str, config: Config) -> Map:
    """From the names in a single file to ours: Black Forest Labs', but Hugging Face's of the text
    encoders."""
    table = _TABLES[component]
    return (getattr(table, "bfl_map", None) or table.diffusers_map)(config)


def config_from_hf(component: str, raw: Mapping[str, Any]) -> Config:
    """A component's config from the `config.json` that diffusers or transformers wrote.

    Raises:
      UserError: another architecture, or a field that is missing or of another type.
    """
    return _TABLES[component].config_from_hf(raw)


def config_to_hf(component: str, config: Config) -> dict[str, Any]:
    """A `config.json` with which diffusers or transformers builds the same component.

    Raises:
      UserError: they have no such model.
    """
    return _TABLES[component].config_to_hf(config)


def config_from_shapes(component: str, shapes: Mapping[str, Shape], *, what: str) -> Config:
    """A component's config, guessed from the tensors of a single file (docs/convert.md).

    Args:
      component: its name.
      shapes: by name, without prefix.
      what: the file, for messages.

    Raises:
      UserError: a tensor that the guess needs is missing or of another shape, or the tensors are
        those of another model.
    """
    with naming(what):
        try:
            return _TABLES[component].config_from_shapes(shapes)
        except UserError:
            raise
        except KeyError as error:
            raise UserError(f"tensor `{error.args[0]}` is missing") from error
        except (IndexError, ZeroDivisionError, ValueError) as error:
            raise UserError(f"the shapes are not those of a {component}") from error


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


def check_components(names: Iterable[str]) -> None:
    """Refuses a name that is no component's.

    Raises:
      UserError: there is one.
    """
    unknown = sorted(set(names) - set(COMPONENTS))
    if unknown:
        raise UserError(
            f"unknown component {', '.join(unknown)}; there are {', '.join(COMPONENTS)}"
        )
