"""The parts of a pipeline from a checkpoint, whatever its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from flux_jax import arguments, assets, stages
from flux_jax.checkpoint import (
    Contents,
    inspect_checkpoint,
    load_checkpoint,
    load_lora,
    resolve_checkpoint,
)
from flux_jax.components import TEXT_ENCODERS, TOKENIZERS
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.lora import LoRA, attach, read_name
from flux_jax.plan import ARGUMENTS, Plan, make_plan
from flux_jax.sharding import place_shapes
from flux_jax.tokenization import stored_max_length

_IMAGE = ("transformer", "vae")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A call that a checkpoint can answer.

    Attributes:
      name: what the model is called in an image's metadata.
      path: the checkpoint's local folder.
      configs: of its four components, by name.
      abstract: from a dtype, each of them in shapes alone.
      plan: the call.
      loras: read, for the transformer.
    """

    name: str
    path: Path
    configs: dict[str, Any]
    abstract: dict[str, Callable[[Any], nnx.Module]]
    plan: Plan
    loras: tuple[LoRA, ...] = ()


def check_request(
    model: str | Path | None,
    settings: Mapping[str, Any],
    *,
    images: int,
    num_images_per_prompt: int,
    mesh: jax.sharding.Mesh | None = None,
    loras: Sequence[str] = (),
    revision: str | None = None,
) -> Request:
    """Check a call's arguments against a checkpoint's configurations, before any weight is read.

    Args:
      model: as for `FluxPipeline.from_pretrained`; None for the shipped one that is the default,
        whatever lies in the working directory.
      settings: keyword arguments of the pipeline's call; those that a plan has no use for are
        ignored.
      images: number of prompts.
      num_images_per_prompt: images of each.
      mesh: the devices, if they are a mesh.
      loras: PATH or PATH:SCALE, as `flux_jax.lora.read_name` takes it. They are read.
      revision: of a hub id, as for `FluxPipeline.from_pretrained`.

    Raises:
      UserError: an argument out of its range, a checkpoint that lacks a part of a pipeline, or a
        LoRA that cannot be read or does not fit.
    """
    name = assets.DEFAULT_MODEL if model is None else str(model)
    source = assets.shipped_path(name) if model is None else model
    found = inspect_checkpoint(source, revision=revision)
    scheduler = check_whole(name, found)
    configs: dict[str, Any] = {name: part.config for name, part in found.components.items()}
    plan = make_plan(
        configs["transformer"],
        configs["vae"],
        scheduler,
        token_limit=stored_max_length(found.tokenizer_paths["tokenizer_2"]),
        num_images_per_prompt=num_images_per_prompt,
        mesh=None if mesh is None else mesh.shape,
        **{name: settings[name] for name in ARGUMENTS if name in settings},
    )
    arguments.seeds_and_keys(settings.get("seed"), None, images * num_images_per_prompt)
    abstract = {name: part.abstract for name, part in found.components.items()}
    names = [read_name(text) for text in loras]
    return Request(
        name=name,
        path=found.path,
        configs=configs,
        abstract=abstract,
        plan=plan,
        loras=tuple(load_lora(path, configs["transformer"], scale=s) for path, s in names),
    )


def check_whole(name: str, found: Contents) -> SchedulerConfig:
    """See that a checkpoint has every part of a pipeline; its scheduler.

    Args:
      name: of the model.
      found: in it.

    Raises:
      UserError: it lacks some.
    """
    missing = [part for part in (*TEXT_ENCODERS, *_IMAGE) if part not in found.components]
    missing += [part for part in TOKENIZERS if part not in found.tokenizer_paths]
    if missing or found.scheduler is None:
        missing += ["scheduler"] if found.scheduler is None else []
        raise UserError(f"{name} is no whole pipeline: it has no {', '.join(missing)}")
    return found.scheduler


def lower_ahead(request: Request, dtype: Any, mesh: jax.sharding.Mesh | None = None) -> list[Any]:
    """The programs of a request on the default device, before its weights are there.

    See `flux_jax.stages.lower_ahead`. Those of a mesh are left to its first call.
    """
    if mesh is not None:
        return []
    models: dict[str, Any] = {
        name: make(arguments.dtype(dtype)) for name, make in request.abstract.items()
    }
    for lora in request.loras:
        attach(models["transformer"], lora)
    for model in models.values():
        place_shapes(model, None)
    return stages.lower_ahead(models, request.plan)


def local_folder(
    path: str | Path,
    *,
    revision: str | None = None,
    without: Collection[str] = (),
    text_encoders: bool = True,
) -> Path:
    """Where a pipeline's files are, a hub id downloaded: once, for all that is then read of it.

    Args:
      path, revision: as for `FluxPipeline.from_pretrained`.
      without: the transformer or the autoencoder, if it is not read.
      text_encoders: whether they are read.

    Raises:
      UserError: no such path, repository or revision.
    """
    image = [name for name in _IMAGE if name not in without]
    wanted = [*(TEXT_ENCODERS if text_encoders else ()), *image]
    return resolve_checkpoint(path, wanted, revision=revision)


def load_image_parts(
    path: str | Path,
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    given: Mapping[str, nnx.Module],
) -> dict[str, Any]:
    """Transformer, autoencoder and scheduler.

    Args:
      path, dtype, mesh: as for `FluxPipeline.from_pretrained`.
      given: models to use in place of the checkpoint's.

    Raises:
      UserError: a checkpoint without one of them.
    """
    wanted = [name for name in _IMAGE if name not in given]
    checkpoint = load_checkpoint(path, components=wanted, dtype=arguments.dtype(dtype), mesh=mesh)
    if checkpoint.scheduler is None:
        raise UserError(f"{path} has no scheduler configuration (scheduler/scheduler_config.json)")
    return {"scheduler": checkpoint.scheduler, **checkpoint.modules, **given}
