"""Loading and saving the components of a FLUX.1 pipeline.

This module is the one place where `flux_jax` reaches for `convert`, which knows every layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flux_jax import arguments
from flux_jax.components import Config, abstract_module
from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.layers import DType
from flux_jax.lora import LoRA, check_no_lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Components of a pipeline, loaded.

    Attributes:
      path: the local folder or file.
      configs: hyper-parameters by component.
      modules: components by diffusers' names: "transformer", "text_encoder" (CLIP),
        "text_encoder_2" (T5), "vae".
      scheduler: the noise schedule; None where the source has none.
      tokenizer_paths: folders of "tokenizer" and "tokenizer_2", as far as there are.
    """

    path: Path
    configs: dict[str, Config]
    modules: dict[str, Any]
    scheduler: SchedulerConfig | None
    tokenizer_paths: dict[str, Path]


def load_checkpoint(
    path_or_repo_id: str | Path,
    *,
    components: str | Sequence[str] | None = None,
    dtype: DType = jnp.bfloat16,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Load components from any layout, straight onto their devices.

    Args:
      path_or_repo_id: a Flax checkpoint that `python -m convert` or `save_checkpoint` wrote, a
        diffusers folder or hub id, or a Black Forest Labs single file.
      components: which one, or which several; None for all that are there. An empty sequence gives
        the configs of the scheduler and the tokenizers alone.
      dtype: of the parameters.
      mesh: devices to spread over, by `flux_jax.sharding.DEFAULT_RULES`; None puts everything on
        JAX's default device.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: no such path, repository or revision, another architecture, or damaged or missing
        weights.
    """
    from convert import load

    # A text is a sequence of texts too, its letters.
    components = [components] if isinstance(components, str) else components
    path = resolve_checkpoint(path_or_repo_id, components, revision=revision)
    loaded = load.load(path, components=components, dtype=dtype, mesh=mesh)
    return Checkpoint(
        path=path,
        configs=loaded.configs,
        modules=loaded.modules,
        scheduler=loaded.scheduler,
        tokenizer_paths=loaded.tokenizers,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredComponent:
    """A component whose weights are left in the checkpoint.

    Attributes:
      path: the local folder or file.
      name: of the component.
      config: hyper-parameters.
      dtype: that its parameters are read in.
      nbytes: of all of them.
    """

    path: Path
    name: str
    config: Config
    dtype: DType
    nbytes: int

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], np.ndarray]]:
        """For the length of a block, a function from a parameter's dotted path to its values.

        Raises:
          UserError: damaged weights; from the function, a tensor that cannot be read.
        """
        from convert import load

        with load.open_parameters(self.path, self.name, self.dtype) as parameters:
            yield functools.partial(load.read_whole, parameters.reader)


def stored_component(
    path_or_repo_id: str | Path, name: str, *, dtype: DType = jnp.bfloat16
) -> StoredComponent:
    """A component that is read when it is needed, its names and shapes checked now.

    Args:
      path_or_repo_id, dtype: as for `load_checkpoint`.
      name: of the component.

    Raises:
      UserError: as for `load_checkpoint`.
    """
    from convert import load

    path = resolve_checkpoint(path_or_repo_id, [name])
    with load.open_parameters(path, name, dtype) as parameters:
        nbytes = sum(spec.nbytes for spec in parameters.reader.specs.values())
        return StoredComponent(
            path=path, name=name, config=parameters.config, dtype=dtype, nbytes=nbytes
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentContents:
    """What one stored component holds, read from its headers.

    Attributes:
      config: hyper-parameters.
      parameters: their number.
      nbytes: of the stored tensors.
      dtypes: of the stored tensors, by NumPy's names.
      quantized: whether they are packed codes, which stand for other tensors.
      abstract: from a dtype, the module that loading would give, in shapes alone.
    """

    config: Config
    parameters: int
    nbytes: int
    dtypes: frozenset[str]
    quantized: bool
    abstract: Callable[[DType], nnx.Module]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What a stored pipeline holds.

    Attributes:
      path: the local folder or file.
      kind: its layout, "diffusers", "bfl" or "flax".
      components: by diffusers' names.
      scheduler, tokenizer_paths: as in `Checkpoint`.
    """

    path: Path
    kind: str
    components: dict[str, ComponentContents]
    scheduler: SchedulerConfig | None
    tokenizer_paths: dict[str, Path]


def resolve_checkpoint(
    path_or_repo_id: str | Path,
    components: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
) -> Path:
    """The local folder or file of a checkpoint; a hub id is downloaded.

    Args:
      path_or_repo_id, components, revision: as for `load_checkpoint`.

    Raises:
      UserError: no such path, repository or revision.
    """
    from convert import hub

    components = [components] if isinstance(components, str) else components
    return hub.resolve(path_or_repo_id, components, revision=revision)


def inspect_checkpoint(path_or_repo_id: str | Path, *, revision: str | None = None) -> Contents:
    """What is in a checkpoint, without reading a weight (a hub id is downloaded whole).

    Args:
      path_or_repo_id, revision: as for `load_checkpoint`.

    Raises:
      UserError: as for `load_checkpoint`.
    """
    from convert import quantized, source

    path = resolve_checkpoint(path_or_repo_id, revision=revision)
    with source.open_source(path) as opened:
        components = {}
        for name, component in opened.components.items():
            reader = component.stored
            specs: Mapping[str, Any] = reader.specs
            abstract = functools.partial(abstract_module, name, component.config)
            if isinstance(reader, quantized.PackedReader):
                # What lies on the disk, beside what it stands for.
                specs, abstract = reader.stored, reader.abstract_module
            components[name] = ComponentContents(
                config=component.config,
                parameters=sum(math.prod(spec.shape) for spec in reader.specs.values()),
                nbytes=sum(spec.nbytes for spec in specs.values()),
                dtypes=frozenset(spec.dtype.name for spec in specs.values()),
                quantized=component.quantized,
                abstract=abstract,
            )
        return Contents(
            path=path,
            kind=opened.kind,
            components=components,
            scheduler=opened.scheduler,
            tokenizer_paths=opened.tokenizers,
        )


def load_lora(path_or_repo_id: str | Path, config: FluxConfig, *, scale: float = 1.0) -> LoRA:
    """A LoRA of a FLUX.1 transformer, in any of the names that `docs/pipeline.md` lists.

    Args:
      path_or_repo_id: a safetensors file, a folder with one, a hub id with the file that diffusers
        writes (owner/name), or a hub file (owner/name/file.safetensors).
      config: of the transformer that it is for.
      scale: by which its changes are multiplied.

    Raises:
      UserError: no such file, another kind of adapter, or one that does not fit the transformer.
    """
    from convert import hub, lora

    found = lora.read_lora(hub.resolve_lora(path_or_repo_id), config)
    scale = arguments.finite("the scale of a LoRA", scale)
    return dataclasses.replace(found, path=str(path_or_repo_id), scale=scale)


def save_lora(path: str | Path, lora: LoRA, config: FluxConfig, *, force: bool = False) -> None:
    """Write a LoRA in diffusers' names.

    Args:
      path: the safetensors file; it appears complete or not at all.
      lora: its scale is multiplied in.
      config: of the transformer that it is for.
      force: replace a file that is there.

    Raises:
      UserError: another suffix, a file that is there or cannot be written, or a LoRA that does not
        fit the transformer.
    """
    from convert import hub, lora_write

    lora_write.write_lora(hub.local_path(path), lora, config, force=force)


def save_checkpoint(
    path: str | Path,
    modules: Mapping[str, nnx.Module],
    *,
    scheduler: SchedulerConfig | None = None,
    tokenizers: Mapping[str, str | Path] | None = None,
    force: bool = False,
) -> None:
    """Write a Flax checkpoint, in the layout of `python -m convert`, from modules in memory.

    The folder appears complete or not at all. Arrays must be addressable by this process.

    Args:
      path: folder to be made.
      modules: components by diffusers' names, each with its `config`; a ternary transformer is
        written by `ternary.save_checkpoint`.
      scheduler: the noise schedule.
      tokenizers: folders to be copied, "tokenizer" and "tokenizer_2".
      force: replace an existing checkpoint, once the new one is whole.

    Raises:
      UserError: the path exists or cannot be written to, a module whose parameters are not those
        of its config, or a tokenizer that is no folder.
    """
    from convert import save

    for module in modules.values():
        check_no_lora(module)
    save.save(path, modules, scheduler, tokenizers or {}, force=force)
