"""LoRA files of FLUX.1 transformers, in every ecosystem's names, to changes of our linears.

A file's tensors are called by the weight that they change, in diffusers' or Black Forest Labs'
names, with a prefix before, a suffix behind, and in some ecosystems underscores for the dots:

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight          diffusers, PEFT, AI-Toolkit
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .alpha   kohya's sd-scripts
    lora_transformer_single_transformer_blocks_0_attn_to_q.lora_up.weight       OneTrainer
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight        ComfyUI
    double_blocks.0.processor.qkv_lora1.down.weight                   XLabs

So the maps of `convert.maps.transformer` say where each belongs. Where a weight of ours has the
rows of several of theirs (q, k and v), their products stand one below the other.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.fp8 import FLOAT8
from convert.maps.transformer import bfl_map, diffusers_map
from convert.problems import naming, refusal
from convert.safetensors_header import SUFFIX
from convert.safetensors_read import PICKLES, SafetensorsReader, refuse_pickle
from convert.tensors import FLOATS, Spec
from convert.transforms import Run
from flux_jax import arguments
from flux_jax.components import abstract_module
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.lora import LoRA, LowRank
from flux_jax.tree import to_flat

logger = logging.getLogger(__name__)

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "",
)
_TEXT_ENCODERS = re.compile(r"(lora_te\d*_|text_encoders?(_\d)?\.|text_model\.)")
# Of the two factors and of the number that scales them. PEFT puts an adapter's name in between.
_PARTS = {
    "a": re.compile(r"(.+?)(?:\.lora_A(?:\.\w+)?|\.lora_down|(?:\.lora)?\.down)\.weight"),
    "b": re.compile(r"(.+?)(?:\.lora_B(?:\.\w+)?|\.lora_up|(?:\.lora)?\.up)\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
# What other kinds of adapters have, and LoRAs that change more than a product.
_OTHERS = {
    "DoRA": re.compile(r".*(dora_scale|lora_magnitude_vector).*"),
    "LoKr": re.compile(r".*\.lokr_\w+"),
    "LoHa": re.compile(r".*\.hada_\w+"),
    "OFT": re.compile(r".*\.(oft_\w+|boft_\w+)"),
    "a LoRA with biases": re.compile(r".*\.(lora_B(\.\w+)?\.bias|diff_b)"),
    "a whole difference": re.compile(r".*\.diff"),
}
# Under which diffusers keeps the settings of an adapter.
_SETTINGS = "lora_adapter_metadata"


class _Place(NamedTuple):
    """Where a foreign weight lies in ours: the linear's path, its shape there, and its rows."""

    layer: str
    shape: tuple[int, int]
    runs: tuple[Run, ...]


def read_lora(path: Path, config: FluxConfig) -> LoRA:
    """A LoRA from a safetensors file.

    What it has for text encoders is left out, with a warning.

    Args:
      path: the file.
      config: of the transformer that it is for.

    Raises:
      UserError: the file cannot be read, is another kind of adapter, or does not fit the
        transformer.
    """
    if path.suffix in PICKLES:
        raise refuse_pickle(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a LoRA is read from a {SUFFIX} file, got another")
    reader = SafetensorsReader.open_file(path)
    try:
        layers = _layers(path, reader, config)
    finally:
        reader.close()
    return LoRA(path=str(path), layers=layers)


def _layers(path: Path, reader: SafetensorsReader, config: FluxConfig) -> dict[str, LowRank]:
    shapes = _shapes(config)
    changes, problems = _changes(reader.specs, _places(config, shapes))
    if problems:
        raise refusal(path, problems)
    if not changes:
        raise UserError(
            f"{path}: none of its {len(reader.specs)} tensors is of a transformer's LoRA"
        )
    found: dict[str, list[tuple[_Place, LowRank]]] = defaultdict(list)
    with naming(path):
        settings = _Settings.of(reader.metadata)
        for change in changes:
            a, b = (_read(reader, change.parts[part]) for part in ("a", "b"))
            rank = a.shape[0]
            if "alpha" in change.parts:
                alpha = float(_read(reader, change.parts["alpha"]).item())
                scale = arguments.finite(f"`{change.stem}.alpha`", alpha) / rank
            else:
                scale = settings.scale(change.stem, rank)
            found[change.place.layer].append((change.place, LowRank(a, b * np.float32(scale))))
    return {layer: _stacked(parts, shapes[layer][0]) for layer, parts in found.items()}


class _Change(NamedTuple):
    """The tensors that change one foreign weight, by part, and what they are called alike."""

    stem: str
    place: _Place
    parts: dict[str, str]


def _changes(
    specs: Mapping[str, Spec], places: Mapping[str, _Place]
) -> tuple[list[_Change], list[str]]:
    """The file's changes, from its header, and what is wrong with it."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    problems, text = [], 0
    for name in specs:
        if _TEXT_ENCODERS.match(name):
            text += 1
            continue
        for kind, pattern in _OTHERS.items():
            if pattern.fullmatch(name):
                problems.append(f"tensor `{name}` is of {kind}, which is not read here")
                break
        else:
            hits = [(p, m.group(1)) for p, regex in _PARTS.items() if (m := regex.fullmatch(name))]
            if not hits:
                problems.append(f"tensor `{name}` is no part of a LoRA")
            for part, stem in hits:
                parts[stem][part] = name
    changes = []
    for stem, found in parts.items():
        place = _place_of(stem, places)
        if place is None:
            problems.append(f"`{stem}` is no linear of this transformer")
            continue
        problem = _problem(found, specs, place)
        if problem is not None:
            problems.append(f"`{stem}` {problem}")
        changes.append(_Change(stem, place, found))
    if text:
        logger.warning(
            "%d tensors for text encoders are left out: only the transformer is changed", text
        )
    return changes, problems


def _problem(parts: Mapping[str, str], specs: Mapping[str, Spec], place: _Place) -> str | None:
    """What is wrong with one change, if anything."""
    for kind, names in (("a", "lora_A or lora_down"), ("b", "lora_B or lora_up")):
        if kind not in parts:
            return f"has no {names}"
        dtype = specs[parts[kind]].dtype
        if dtype not in (*FLOATS, *FLOAT8):
            return f"is stored as {dtype.name}, expected a float of at most 32 bits"
    first, second = (specs[parts[kind]].shape for kind in ("a", "b"))
    (rank, inputs), (outputs, other) = _flat(first), _flat(second)
    if (outputs, inputs) != place.shape or rank != other or not rank:
        rows, columns = place.shape
        return f"has factors {first} and {second}, for a weight of {rows} x {columns} here"
    if "alpha" in parts and math.prod(specs[parts["alpha"]].shape) != 1:
        return f"has an alpha of shape {specs[parts['alpha']].shape}, expected one number"
    return None


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a matrix, or a 1x1 convolution's that stands for one; another shape fits nothing."""
    return (shape[0], math.prod(shape[1:])) if len(shape) in (2, 4) else (0, 0)


def _read(reader: SafetensorsReader, name: str) -> np.ndarray:
    """A tensor in float32: a factor as a matrix, or one number."""
    spec = reader.specs[name]
    out = np.empty(spec.shape or (1,), spec.dtype)
    reader.read_into(name, 0, out)
    out = out.astype(np.float32)
    return out if out.size == 1 and len(spec.shape) < 2 else out.reshape(_flat(spec.shape))


def _stacked(parts: list[tuple[_Place, LowRank]], rows: int) -> LowRank:
    """Changes of parts of a weight's rows as one change of the whole."""
    rank = sum(change.a.shape[0] for _, change in parts)
    b = np.zeros((rows, rank), np.float32)
    column = 0
    for place, change in parts:
        columns = slice(column, column := column + change.a.shape[0])
        for run in place.runs:
            source = slice(run.source_row, run.source_row + run.rows)
            b[run.target_row : run.target_row + run.rows, columns] = change.b[source]
    return LowRank(np.concatenate([change.a for _, change in parts]), b)


def _shapes(config: FluxConfig) -> dict[str, tuple[int, int]]:
    """Of every linear's weight, by the linear's path."""
    flat = to_flat(abstract_module("transformer", config))
    return {
        name.removesuffix(".weight"): value.shape
        for name, value in flat.items()
        if name.endswith(".weight") and len(value.shape) == 2
    }


def _places(config: FluxConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, _Place]:
    """Of every linear's weight under every ecosystem's name, its dots as underscores."""
    found = {}
    for layer, shape in shapes.items():
        for table in (bfl_map(config), diffusers_map(config)):
            for piece in table.sources_of(f"{layer}.weight", shape):
                rows, columns = piece.source_shape
                stem = piece.source.removesuffix(".weight")
                found[_plain(stem)] = _Place(layer, (rows, columns), piece.runs)
    for stem, layer in _xlabs_names(config):
        rows, columns = shapes[layer]
        # In a single block it is the attention's rows alone.
        rows = 3 * config.hidden_size if layer.endswith("linear1") else rows
        found[_plain(stem)] = _Place(layer, (rows, columns), (Run(0, 0, rows),))
    return found


def _xlabs_names(config: FluxConfig) -> Iterator[tuple[str, str]]:
    for block in range(config.depth):
        for stream, number in (("img", 1), ("txt", 2)):
            for part in ("qkv", "proj"):
                stem = f"double_blocks.{block}.processor.{part}_lora{number}"
                yield stem, f"double_blocks.{block}.{stream}_attn.{part}"
    for block in range(config.depth_single_blocks):
        yield f"single_blocks.{block}.processor.qkv_lora", f"single_blocks.{block}.linear1"
        yield f"single_blocks.{block}.processor.proj_lora", f"single_blocks.{block}.linear2"


def _plain(stem: str) -> str:
    return stem.replace(".", "_")


def _place_of(stem: str, places: Mapping[str, _Place]) -> _Place | None:
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            place = places.get(_plain(stem.removeprefix(prefix)))
            if place is not None:
                return place
    return None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """PEFT's settings of the transformer's adapter, as far as they scale it.

    Attributes:
      alpha: for all changes; None for their rank.
      patterns: for changes whose name ends so, instead.
      by_root: whether it is over the root of the rank (rank-stabilised LoRA).
    """

    alpha: float | None
    patterns: tuple[tuple[re.Pattern[str], float], ...]
    by_root: bool

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> _Settings:
        """From a file's metadata, where diffusers keeps them.

        Raises:
          UserError: they cannot be understood.
        """
        try:
            found = json.loads(metadata.get(_SETTINGS, "{}"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"its metadata `{_SETTINGS}` is no JSON object")
        alpha = found.get("transformer.lora_alpha")
        patterns = found.get("transformer.alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"its alpha_pattern must be an object, got {patterns!r}")
        try:
            # As PEFT has it: the end of a module's name, at a dot.
            compiled = [(re.compile(rf"(.*\.)?({k})$"), v) for k, v in patterns.items()]
        except re.error as error:
            raise UserError(f"its alpha_pattern has no pattern: {error}") from error
        return cls(
            alpha=None if alpha is None else arguments.finite("its lora_alpha", alpha),
            patterns=tuple((k, arguments.finite("its alpha_pattern", v)) for k, v in compiled),
            by_root=found.get("transformer.use_rslora") is True,
        )

    def scale(self, stem: str, rank: int) -> float:
        """Of one change."""
        found = [alpha for pattern, alpha in self.patterns if pattern.match(stem)]
        alpha = found[0] if found else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)
