"""LoRA files of FLUX.1 transformers, in every ecosystem's names, to changes of our linears.

A file's tensors are called by the weight that they change, in diffusers' or Black Forest Labs'
names, with a prefix before, a suffix behind, and in some ecosystems underscores for the dots:

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight          diffusers, PEFT, AI-Toolkit
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .alpha   kohya's sd-scripts
    lora_transformer_single_transformer_blocks_0_attn_to_q.lora_up.weight       OneTrainer
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight        ComfyUI
    double_blocks.0.processor.qkv_lora1.down.weight                   XLabs
    double_blocks.0.img_attn.qkv.0.lora_down.weight                   OneTrainer's OMI format
    lycoris_transformer_blocks_0_attn_to_q.lora_down.weight           LyCORIS

So the maps of `convert.maps.transformer` say where each belongs. Where a weight of ours has the
rows of several of theirs (q, k and v), their products stand one below the other.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.files import read_json
from convert.fp8 import FLOAT8
from convert.hub import PEFT_FILES
from convert.maps.transformer import bfl_map, diffusers_map
from convert.problems import naming, refusal
from convert.safetensors_header import SUFFIX
from convert.safetensors_read import PICKLES, SafetensorsReader, refuse_pickle
from convert.tensors import FLOATS, Spec, read_whole
from convert.transforms import Run
from flux_jax import arguments
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.json_values import parse_json
from flux_jax.lora import LoRA, LowRank, linear_shapes

logger = logging.getLogger(__name__)

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
    "",
)
# What is not of the transformer: text encoders, and embeddings of words.
_LEFT_OUT = re.compile(
    r"(lora_te\d*_|text_encoders?(_\d)?\.|text_model\.|clip_l\.|t5(xxl)?\.|bundle_emb\.)"
)
# Of the two factors and of the number that scales them. PEFT puts an adapter's name in between.
_PARTS = {
    "a": re.compile(r"(.+?)(?:\.lora_A(?:\.[\w-]+)?|\.lora_down|(?:\.lora)?\.down)\.weight"),
    "b": re.compile(r"(.+?)(?:\.lora_B(?:\.[\w-]+)?|\.lora_up|(?:\.lora)?\.up)\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
# What other kinds of adapters have, and LoRAs that change more than a product; of the last two,
# tools that extract LoRAs leave some that are all zeros.
_OTHERS = {
    "DoRA": re.compile(r".*(dora_scale|lora_magnitude_vector).*"),
    "LoKr": re.compile(r".*\.lokr_\w+"),
    "LoHa": re.compile(r".*\.hada_\w+"),
    "OFT": re.compile(r".*\.(oft_\w+|boft_\w+)"),
    "a LoRA with biases": re.compile(r".*\.(lora_B(\.[\w-]+)?\.bias|diff_b)"),
    "a whole difference": re.compile(r".*\.diff"),
}
_MAY_BE_ZERO = ("a LoRA with biases", "a whole difference")
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
    shapes = linear_shapes(config)
    changes, problems = _changes(reader, _places(config, shapes))
    if problems:
        raise refusal(path, problems)
    if not changes:
        raise UserError(
            f"{path}: none of its {len(reader.specs)} tensors is of a transformer's LoRA"
        )
    found: dict[str, list[tuple[_Place, LowRank]]] = defaultdict(list)
    with naming(path):
        settings = _Settings.of(_stored_settings(path, reader.metadata))
        for change in changes:
            a, b = (_read(reader, change.parts[part]) for part in ("a", "b"))
            rank = a.shape[0]
            if "alpha" in change.parts:
                alpha = float(_read(reader, change.parts["alpha"]).item())
                scale = arguments.finite(f"`{change.stem}.alpha`", alpha) / rank
            else:
                scale = settings.scale(change.name, rank)
            found[change.place.layer].append((change.place, LowRank(a, b * np.float32(scale))))
    return {layer: _stacked(parts, shapes[layer][0]) for layer, parts in found.items()}


class _Change(NamedTuple):
    """The tensors that change one foreign weight, by part.

    Attributes:
      stem: what they are called alike.
      name: the weight, without a prefix.
    """

    stem: str
    name: str
    place: _Place
    parts: dict[str, str]


def _changes(
    reader: SafetensorsReader, places: Mapping[str, _Place]
) -> tuple[list[_Change], list[str]]:
    """The file's changes, from its header, and what is wrong with it."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    specs, problems, left_out = reader.specs, [], 0
    for name in specs:
        if _LEFT_OUT.match(name):
            left_out += 1
            continue
        for kind, pattern in _OTHERS.items():
            if pattern.fullmatch(name):
                if not (kind in _MAY_BE_ZERO and _is_zero(reader, name)):
                    problems.append(f"tensor `{name}` is of {kind}, which is not read here")
                break
        else:
            hits = [(p, m.group(1)) for p, regex in _PARTS.items() if (m := regex.fullmatch(name))]
            if not hits:
                problems.append(f"tensor `{name}` is no part of a LoRA")
            for part, stem in hits:
                if part in parts[stem]:
                    problems.append(
                        f"tensors `{parts[stem][part]}` and `{name}` are the same part of one "
                        "change: are there two LoRAs in it?"
                    )
                parts[stem][part] = name
    changes: list[_Change] = []
    for stem, found in parts.items():
        placed = _place_of(stem, places)
        if placed is None:
            problems.append(f"`{stem}` is no linear of this transformer")
            continue
        name, place = placed
        twice = next((other.stem for other in changes if _overlap(other.place, place)), None)
        if twice is not None:
            problems.append(f"`{twice}` and `{stem}` change the same weight")
        problem = _problem(found, specs, place)
        if problem is not None:
            problems.append(f"`{stem}` {problem}")
        changes.append(_Change(stem, name, place, found))
    if left_out:
        logger.warning(
            "%d tensors for text encoders are left out: only the transformer is changed", left_out
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
    if "alpha" in parts and specs[parts["alpha"]].shape not in ((), (1,), (1, 1)):
        return f"has an alpha of shape {specs[parts['alpha']].shape}, expected one number"
    return None


def _overlap(one: _Place, other: _Place) -> bool:
    """Whether two weights have rows of ours in common: a file may hold one LoRA in two namings."""
    return one.layer == other.layer and any(
        a.target_row < b.target_row + b.rows and b.target_row < a.target_row + a.rows
        for a in one.runs
        for b in other.runs
    )


def _is_zero(reader: SafetensorsReader, name: str) -> bool:
    return not read_whole(reader, name).any()


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix's shape, or that of a 1x1 convolution that stands for one; others fit nothing."""
    return (shape[0], math.prod(shape[1:])) if len(shape) in (2, 4) else (0, 0)


def _read(reader: SafetensorsReader, name: str) -> np.ndarray:
    """A tensor in float32: a factor as a matrix, or one number."""
    out = read_whole(reader, name).astype(np.float32)
    return out if out.ndim < 2 else out.reshape(_flat(out.shape))


def _stacked(parts: list[tuple[_Place, LowRank]], rows: int) -> LowRank:
    """Changes of parts of a weight's rows as one change of the whole.

    Parts with the same first factor, as those of a weight that was one when it was trained, share
    it: the rank, and with it a step's work, would else be the sum of theirs.
    """
    firsts: list[np.ndarray] = []
    seconds: list[np.ndarray] = []
    for place, change in parts:
        same = (n for n, first in enumerate(firsts) if np.array_equal(first, change.a))
        number = next(same, len(firsts))
        if number == len(firsts):
            firsts.append(change.a)
            seconds.append(np.zeros((rows, change.a.shape[0]), np.float32))
        for run in place.runs:
            source = slice(run.source_row, run.source_row + run.rows)
            seconds[number][run.target_row : run.target_row + run.rows] = change.b[source]
    return LowRank(np.concatenate(firsts), np.concatenate(seconds, axis=1))


def _places(config: FluxConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, _Place]:
    """The places of every linear's weight, by every ecosystem's name with dots as underscores."""
    found = {}
    for layer, shape in shapes.items():
        for table in (bfl_map(config), diffusers_map(config)):
            for piece in table.sources_of(f"{layer}.weight", shape):
                rows, columns = piece.source_shape
                stem = piece.source.removesuffix(".weight")
                found[_plain(stem)] = _Place(layer, (rows, columns), piece.runs)
        # OMI's names are Black Forest Labs', with the parts numbered that diffusers has apart.
        (whole,) = bfl_map(config).sources_of(f"{layer}.weight", shape)
        pieces = diffusers_map(config).sources_of(f"{layer}.weight", shape)
        for number, piece in enumerate(pieces if len(pieces) > 1 else ()):
            stem = f"{whole.source.removesuffix('.weight')}.{number}"
            rows, columns = piece.source_shape
            found[_plain(stem)] = _Place(layer, (rows, columns), piece.runs)
    found["img_in_proj"] = found["img_in"]
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


def _place_of(stem: str, places: Mapping[str, _Place]) -> tuple[str, _Place] | None:
    """A weight's name without its prefix, and where it lies."""
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix)
            if _plain(name) in places:
                return name, places[_plain(name)]
    return None


def _stored_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings of the transformer's adapter; empty where there are none.

    diffusers keeps them in the file, those of a whole pipeline by component; PEFT beside it.

    Raises:
      UserError: they are no JSON object.
    """
    beside = path.with_name(PEFT_FILES[1])
    if path.name == PEFT_FILES[0] and beside.is_file():
        return read_json(beside)
    found = parse_json(metadata.get(_SETTINGS, "{}"), f"its metadata `{_SETTINGS}`")
    if not isinstance(found, dict):
        raise UserError(f"its metadata `{_SETTINGS}` is no JSON object")
    if any("." in key for key in found):
        prefix = "transformer."
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    return found


@dataclasses.dataclass(frozen=True)
class _Settings:
    """PEFT's settings of the transformer's adapter, as far as they scale it.

    Attributes:
      alpha: for all changes; None for their rank.
      ends: for changes whose name ends so, at a dot, instead; one that begins with ^ is a whole
        name.
      by_root: whether it is over the root of the rank (rank-stabilised LoRA).
    """

    alpha: float | None
    ends: tuple[tuple[str, float], ...]
    by_root: bool

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> _Settings:
        """From PEFT's settings.

        Raises:
          UserError: they cannot be understood.
        """
        alpha = found.get("lora_alpha")
        ends = found.get("alpha_pattern") or {}
        if not isinstance(ends, dict):
            raise UserError(f"its alpha_pattern must be an object, got {ends!r}")
        for end in ends:
            # PEFT would take any regular expression, one that never ends among them. What trainers
            # and diffusers write are names.
            if not re.fullmatch(r"\^?[\w.]+", end):
                raise UserError(f"its alpha_pattern must have names of modules, got {end[:80]!a}")
        return cls(
            alpha=None if alpha is None else arguments.finite("its lora_alpha", alpha),
            ends=tuple((k, arguments.finite("its alpha_pattern", v)) for k, v in ends.items()),
            by_root=found.get("use_rslora") is True,
        )

    def scale(self, name: str, rank: int) -> float:
        """The factor of a weight's change, by its name without a prefix."""

        def fits(end: str) -> bool:
            return name == end[1:] if end[0] == "^" else f".{name}".endswith(f".{end}")

        found = [alpha for end, alpha in self.ends if fits(end)]
        alpha = found[0] if found else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)
