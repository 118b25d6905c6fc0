"""Where weights come from: a diffusers folder, a single file, or a Flax checkpoint.

`open_source` finds out which, reads configs and headers, and checks names and shapes before any
weight is read. What it returns is the same for all: our parameters, by component, readable in
blocks of rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import flax_config, quantized, single_file, tables
from convert.files import read_json
from convert.fp8 import Dequantized, has_float8
from convert.maps import scheduler
from convert.plan import forward_plan
from convert.problems import naming
from convert.rules import Map
from convert.safetensors_header import SUFFIX
from convert.safetensors_read import PICKLES, SafetensorsReader, open_component, refuse_pickle
from convert.tensors import Assembled, Reader, StoredReader, blocks
from flux_jax.components import TOKENIZERS, Config
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError

# Pipelines of diffusers that hold an unchanged FLUX.1; the transformer's config is checked besides.
PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
# The first that a name begins with. Kontext's weights have FLUX.1's shapes: only the name tells.
_OTHER_PIPELINES = {
    "FluxKontext": "FLUX.1-Kontext, which edits a given image",
    "FluxFill": "FLUX.1-Fill, which fills in a given image",
    "FluxPriorRedux": "FLUX.1-Redux, which varies a given image",
    "FluxControlNet": "FLUX.1 with a ControlNet",
    "FluxControl": "FLUX.1-Canny or -Depth, which follows a given image",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion": "Stable Diffusion",
    "Flux2": "FLUX.2",
}


@dataclasses.dataclass(frozen=True)
class Component:
    """One component of a source.

    Attributes:
      config: its hyper-parameters.
      stored: reader of the stored tensors.
      table: from the stored names to ours; None where they are ours already.
      what: component and file, for messages.
      dropped: `(stored name, reason)` of each tensor that was left out already.
    """

    config: Config
    stored: StoredReader
    table: Map | None
    what: str
    dropped: tuple[tuple[str, str], ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether codes are stored, which stand for the tensors that are read."""
        return isinstance(self.stored, quantized.PackedReader)


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything a conversion can read.

    Attributes:
      path: of the folder or file.
      kind: "diffusers", "bfl" or "flax".
      components: by diffusers' names.
      scheduler: the noise schedule; None where there is none.
      tokenizers: folders by name, "tokenizer" and "tokenizer_2".
      there: names of all components that it has, opened or not.
    """

    path: Path
    kind: str
    components: dict[str, Component]
    scheduler: SchedulerConfig | None
    tokenizers: dict[str, Path]
    there: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """A component's parameters under our names.

    Attributes:
      config: the component's hyper-parameters.
      reader: of the parameters.
      dropped: `(stored name, reason)` of each tensor that is left out.
    """

    config: Config
    reader: Reader
    dropped: tuple[tuple[str, str], ...]


@contextlib.contextmanager
def open_source(
    path: Path, components: Sequence[str] | None = None, *, read_once: bool = False
) -> Iterator[Source]:
    """Open a source and keep its files open for the length of the block.

    Args:
      path: a diffusers folder (or one component's folder of it), a folder or file of single-file
        weights, or a Flax checkpoint of ours.
      components: which to open; None for all that are there.
      read_once: see `SafetensorsReader`.

    Raises:
      UserError: the path is none of these, is another architecture, or lacks a component.
    """
    if components is not None:
        tables.check_components(list(components))
    source = _open(path, components)
    try:
        if components is not None:
            missing = [name for name in components if name not in source.components]
            if missing:
                found = ", ".join(source.there) or "no component of FLUX.1"
                raise UserError(f"{path}: has no {', '.join(missing)}; it has {found}")
        for component in source.components.values():
            component.stored.read_once = read_once
        # A folder of one component is opened to see which it is.
        wanted = {
            name: component
            for name, component in source.components.items()
            if components is None or name in components
        }
        yield dataclasses.replace(source, components=wanted)
    finally:
        for component in source.components.values():
            component.stored.close()


def _open(path: Path, components: Sequence[str] | None) -> Source:
    if path.is_file():
        return _open_single_files(path, [path], components)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if (path / "model_index.json").exists():
        return _open_diffusers(path, components)
    if (path / "config.json").exists():
        raw = read_json(path / "config.json")
        if raw.get("format") == flax_config.FORMAT:
            return _open_flax(path, raw, components)
        return _open_component_folder(path, raw)
    files = sorted(file for file in path.iterdir() if file.suffix in (SUFFIX, *PICKLES))
    if files:
        return _open_single_files(path, files, components)
    raise UserError(
        f"{path}: neither model_index.json nor config.json nor .safetensors files in it; expected "
        "a diffusers folder, a Black Forest Labs file or a Flax checkpoint"
    )


def _open_diffusers(path: Path, components: Sequence[str] | None) -> Source:
    index = read_json(path / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        known = next((m for p, m in _OTHER_PIPELINES.items() if pipeline.startswith(p)), None)
        raise UserError(
            f"{path}: this is {known or 'another model'} ({ascii(pipeline)[:80]}), expected "
            "FLUX.1 (FluxPipeline)"
        )
    listed = {name: index.get(name) for name in tables.COMPONENTS}
    there = tuple(n for n, entry in listed.items() if isinstance(entry, list) and None not in entry)
    found = {}
    for name in there if components is None else [n for n in components if n in there]:
        if not (path / name).is_dir():
            raise UserError(
                f"{path / name}: missing, though model_index.json lists it; download it, or ask "
                "for the other components alone"
            )
        found[name] = _diffusers_component(name, path / name)
    if components is None and not found:
        raise UserError(f"{path}: model_index.json lists no component with weights")
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    schedule = None
    if scheduler_file.is_file():
        with naming(scheduler_file):
            schedule = scheduler.config_from_hf(read_json(scheduler_file))
    return Source(path, "diffusers", found, schedule, _tokenizers(path), there)


def _tokenizers(path: Path) -> dict[str, Path]:
    return {name: path / name for name in TOKENIZERS if (path / name).is_dir()}


def _diffusers_component(name: str, folder: Path) -> Component:
    raw = read_json(folder / "config.json")
    if raw.get(tables.QUANTIZATION) is not None:
        opened = quantized.open_quantized(name, folder, raw)
        return Component(opened.config, opened, None, f"{name} of {folder}")
    with naming(folder / "config.json"):
        config = tables.config_from_hf(name, raw)
    reader = open_component(folder)
    return Component(config, reader, tables.diffusers_map(name, config), f"{name} of {folder}")


def _open_component_folder(path: Path, raw: dict[str, Any]) -> Source:
    """A folder with one component, such as `FLUX.1-dev/transformer`."""
    classes = {class_name: name for name, (_, class_name) in tables.CLASSES.items()}
    architectures = raw.get("architectures")
    stated = [raw.get("_class_name")]
    stated += architectures if isinstance(architectures, list) else []
    name = next((classes[c] for c in stated if isinstance(c, str) and c in classes), None)
    if name is None:
        model = next((c for c in stated if isinstance(c, str)), "no class name")
        raise UserError(
            f"{path}: config.json is of {ascii(model)[:80]}, expected one of {', '.join(classes)}"
        )
    component = _diffusers_component(name, path)
    return Source(path, "diffusers", {name: component}, None, {}, (name,))


def _open_single_files(
    path: Path, files: Sequence[Path], components: Sequence[str] | None
) -> Source:
    found: dict[str, Component] = {}
    there: set[str] = set()
    for file in files:
        if file.suffix in PICKLES:
            raise refuse_pickle(file)
        if file.suffix != SUFFIX:
            raise UserError(f"{file}: not a .safetensors file; no other kind is read")
        reader = SafetensorsReader.open_file(file)
        for part in single_file.split(reader, what=str(file)):
            there.add(part.component)
            if components is not None and part.component not in components:
                continue
            what = f"{part.component} of {file}"
            if part.component in found:
                raise UserError(
                    f"{what}: there is another in {found[part.component].what}; keep one"
                )
            table = tables.single_file_map(part.component, part.config)
            found[part.component] = Component(part.config, part.reader, table, what, part.dropped)
    # Black Forest Labs' files hold no schedule; theirs is dev's, or schnell's without guidance.
    model = found.get("transformer")
    guided = getattr(model.config, "guidance_embed", True) if model else True
    schedule = SchedulerConfig.dev() if guided else SchedulerConfig.schnell()
    ordered = {name: found[name] for name in tables.COMPONENTS if name in found}
    names = tuple(name for name in tables.COMPONENTS if name in there)
    return Source(path, "bfl", ordered, schedule if model else None, {}, names)


def _open_flax(path: Path, raw: dict[str, Any], components: Sequence[str] | None) -> Source:
    from convert.orbax_read import OrbaxReader

    configs, schedule = flax_config.parse_config(path / "config.json", raw)
    found = {}
    for name, config in configs.items():
        if components is None or name in components:
            reader = OrbaxReader(path / name)
            found[name] = Component(config, reader, None, f"{name} of {path}")
    return Source(path, "flax", found, schedule, _tokenizers(path), tuple(configs))


def parameters(component: str, source: Component, dtype: np.dtype | None) -> Parameters:
    """A component's parameters under our names, checked to be complete.

    Args:
      component: its name.
      source: where it is.
      dtype: of all parameters; None keeps the stored ones (float8 becomes bfloat16).

    Raises:
      UserError: a leftover, missing or misshapen tensor, all in one report.
    """
    stored: Any = source.stored
    dropped = list(source.dropped)
    if has_float8(stored):
        stored = Dequantized(stored, dtype, what=source.what)
        dropped += stored.dropped
    shapes = {name: spec.shape for name, spec in stored.specs.items()}
    with naming(source.what):
        ours = tables.our_shapes(component, source.config)
    table = source.table or tables.IDENTITY_MAP
    plan = forward_plan(table, shapes, ours, what=source.what)
    for one, other in plan.ties:
        _check_equal(stored, one, other, source.what)
    reader = Assembled(stored, plan.assemblies, dtype, what=source.what)
    return Parameters(source.config, reader, (*dropped, *plan.dropped))


def _check_equal(reader: Reader, one: str, other: str, what: str) -> None:
    same = reader.specs[one] == reader.specs[other] and all(
        a.tobytes() == b.tobytes()
        for a, b in zip(blocks(reader, one), blocks(reader, other), strict=True)
    )
    if not same:
        raise UserError(
            f"{what}: tensors `{one}` and `{other}` differ, expected the same weights twice"
        )
