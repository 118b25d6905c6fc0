"""Single files without a config: which model is in them, and of what size.

Black Forest Labs publishes `flux1-dev.safetensors` and `ae.safetensors`; others the text encoders
as one file each, or everything in one file, each component under a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from convert.fp8 import MARKER, MARKER_REASON
from convert.problems import refusal
from convert.safetensors_read import SafetensorsReader
from convert.tables import config_from_json, config_from_shapes
from convert.tensors import Spec, StoredReader
from convert.transforms import Shape
from flux_jax.components import Config
from flux_jax.errors import UserError
from flux_jax.json_values import parse_json

# In `__metadata__`: the config of a file that we wrote, so that nothing has to be guessed.
CONFIG_KEY = "flux_jax.config"

# People's single files carry the prefix of the program that they were made for.
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
}

# One tensor that tells what a file is; the first that is there decides.
_OURS = {
    "transformer": "double_blocks.0.img_attn.qkv.weight",
    "vae": "decoder.up.0.block.0.conv1.weight",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q.weight",
}
_OTHERS = (
    (r"double_stream_modulation_img\..*", "a FLUX.2 transformer"),
    (r"joint_blocks\.\d+\..*", "a Stable Diffusion 3 transformer"),
    (r"(down|input)_blocks\.\d+\..*", "a Stable Diffusion 1, 2 or XL model"),
    (r".*\.lora_(A|B|up|down)\..*|lora_.*", "a LoRA, not a whole model"),
    (
        r"(single_)?transformer_blocks\.\d+\..*",
        "one component in diffusers' layout: pass the folder with its config.json",
    ),
    (r".*\.(absmax|quant_map|qweight|qzeros)|.*\.quant_state\..*", "quantised below 8 bits"),
)

# Of CLIP's image-text head, which FLUX.1 has no use for.
_NOT_USED = r"logit_scale|text_projection(\.weight)?"
_NOT_USED_REASON = "of CLIP's image-text head, which FLUX.1 does not use"


class Part(NamedTuple):
    """A component found in a single file: a reader of its tensors under plain names.

    Attributes:
      dropped: `(stored name, reason)` of each tensor that is none of the reader's.
    """

    component: str
    config: Config
    reader: StoredReader
    dropped: tuple[tuple[str, str], ...] = ()


class Renamed:
    """A reader of some of another reader's tensors under other names.

    Attributes:
      specs: by new name.
    """

    def __init__(self, source: SafetensorsReader, names: Mapping[str, str]):
        """A view of some tensors.

        Args:
          source: reader of the tensors.
          names: new name to old name.
        """
        self._source, self._names = source, dict(names)
        self.specs: dict[str, Spec] = {new: source.specs[old] for new, old in names.items()}

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        self._source.read_into(self._names[name], row, out)

    @property
    def read_once(self) -> bool:
        """As of the other reader."""
        return self._source.read_once

    @read_once.setter
    def read_once(self, value: bool) -> None:
        self._source.read_once = value

    def close(self) -> None:
        """Close the other reader's files."""
        self._source.close()


def split(reader: SafetensorsReader, *, what: str) -> list[Part]:
    """The components in a file.

    Args:
      reader: of the file.
      what: the file, for messages.

    Raises:
      UserError: another architecture, which is named; or tensors that belong to no component.
    """
    groups: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    for name in reader.specs:
        for component, prefixes in _PREFIXES.items():
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            if prefix is not None:
                groups.setdefault(component, {})[name.removeprefix(prefix)] = name
                break
        else:
            rest[name] = name
    if groups:
        # The marker of a scaled fp8 file may stand outside of the prefix.
        strangers = [name for name in rest if name != MARKER]
        if strangers:
            raise refusal(what, [f"tensor `{name}` belongs to no component" for name in strangers])
    else:
        groups[_identify(rest, what)] = rest
    parts: list[Part] = []
    for component, names in groups.items():
        found = _identify(names, what)
        if found != component:
            raise UserError(f"{what}: the {component} in it is a {found}")
        unused = [old for new, old in names.items() if re.fullmatch(_NOT_USED, new)]
        dropped = [(name, _NOT_USED_REASON) for name in unused]
        if groups and not parts and MARKER in rest and MARKER not in names:
            dropped.append((MARKER, MARKER_REASON))
        names = {new: old for new, old in names.items() if old not in unused}
        view = Renamed(reader, names)
        shapes = {name: spec.shape for name, spec in view.specs.items()}
        config = _config(component, shapes, reader.metadata, what)
        parts.append(Part(component, config, view, tuple(dropped)))
    return parts


def _identify(names: Mapping[str, str], what: str) -> str:
    """The component that a set of names is."""
    for pattern, model in _OTHERS:
        if any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{what}: this is {model}; expected FLUX.1")
    for component, name in _OURS.items():
        if name in names:
            return component
    first = next(iter(names), None)
    raise UserError(
        f"{what}: no FLUX.1 model recognised"
        + (f" (its first tensor is `{first}`)" if first else " (it holds no tensors)")
        + "; expected flux1-dev.safetensors, flux1-schnell.safetensors, ae.safetensors or a "
        "diffusers folder"
    )


def _config(
    component: str, shapes: Mapping[str, Shape], metadata: Mapping[str, str], what: str
) -> Config:
    """A component's config: from our note in the file, or guessed."""
    if CONFIG_KEY in metadata:
        configs = parse_json(metadata[CONFIG_KEY], f"{what}: `{CONFIG_KEY}` in its metadata")
        if isinstance(configs, dict) and component in configs:
            return config_from_json(component, configs[component], what=f"{what}: {component}")
    return config_from_shapes(component, shapes, what=what)
