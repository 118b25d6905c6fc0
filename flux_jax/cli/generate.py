"""`python -m flux_jax generate`: text to PNG, and PNG to the same PNG again."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flux_jax.assets import REPO_ID, SHIPPED
from flux_jax.cli import common
from flux_jax.cli.many import generate_many
from flux_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flux_jax.metadata import GenerationRecord
    from flux_jax.pipeline import FluxPipeline

logger = logging.getLogger(__name__)


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The PNG. Several images: image-0.png, image-1.png ... With --prompts a folder.",
        ),
    ] = Path("image.png"),
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="UTF-8 text, a prompt a line: all are drawn into the folder --out, 00000.png ... "
            "A run that was stopped goes on when the command is given again.",
            show_default=False,
        ),
    ] = None,
    model: common.Model = None,
    revision: common.Revision = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Image i takes SEED + i.", show_default="a new one, reported; with --prompts 0"
        ),
    ] = None,
    steps: common.Steps = None,
    height: common.Side = None,
    width: common.Side = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt (not schnell).", show_default="3.5"),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What to steer away from; takes effect with --true-cfg.")
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(help="Strength of that, above 1; doubles the time.", show_default="1"),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each prompt.")] = 1,
    max_sequence_length: common.Length = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32.", show_default="bf16")] = None,
    lora: common.LoRAs = None,
    batch_size: common.BatchSize = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Draw this PNG again, from its metadata; other options change what they name.",
            show_default=False,
        ),
    ] = None,
    offload_modulation: Annotated[
        bool,
        typer.Option(
            "--offload-modulation",
            help="A quarter of the transformer, which only prepares the steps, waits on the host.",
        ),
    ] = False,
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Keep all of this in the PNG.")
    ] = True,
    mesh: common.MeshOption = None,
    distributed: common.Distributed = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Draw images from text.

    The PNG carries its prompt, seed, settings and the fingerprint of the model, and --replay draws
    it again.

    \b
    Examples:
      python -m flux_jax generate "a red circle above a blue square" --seed 0
      python -m flux_jax generate "two green stars" "a ring" --num-images 2 --out shapes.png
      python -m flux_jax generate "a lighthouse" --model black-forest-labs/FLUX.1-dev --width 768
      python -m flux_jax generate "a lighthouse" --model FOLDER --lora style.safetensors:0.8
      python -m flux_jax generate --replay image.png --out again.png
      python -m flux_jax generate "a lighthouse" --model FOLDER --mesh sequence=4
      python -m flux_jax generate --prompts prompts.txt --out images --mesh data=4
    """
    explicit = {
        "prompt": prompts or None,
        "negative_prompt": negative,
        "seed": seed,
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg,
        "max_sequence_length": max_sequence_length,
        "batch_size": batch_size,
        "model": model,
        "dtype": None if dtype is None else common.dtype_name(dtype),
        "loras": lora or None,
    }
    given = {name: value for name, value in explicit.items() if value is not None}
    shared: dict[str, Any] = {
        "num_images": num_images,
        "revision": revision,
        "mesh": mesh,
        "offload_modulation": offload_modulation,
        "as_json": json,
        "quiet": quiet,
    }
    if prompt_file is None:
        if distributed:
            raise UserError("--distributed goes with --prompts: the processes share its lines")
        with common.naming_options():
            _generate(given, out=out, replay=replay, metadata=metadata, **shared)
        return
    # What is drawn is known again by its record.
    others = {"PROMPT": prompts, "--replay": replay, "--no-metadata": not metadata}
    for name, used in others.items():
        if used:
            raise UserError(f"--prompts goes without {name}")
    if out.suffix.lower() == ".png":
        raise UserError(f"--prompts draws into a folder: give one with --out, got {out}")
    with common.naming_options():
        generate_many(prompt_file, out, given, distributed=distributed, **shared)


def _generate(
    explicit: dict[str, Any],
    *,
    out: Path,
    num_images: int,
    revision: str | None,
    mesh: str | None,
    replay: Path | None,
    metadata: bool,
    offload_modulation: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    # Late: JAX takes a second, and --help should not.
    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.metadata import save_png

    common.check_png_target(out)
    enable_compilation_cache()
    devices = common.mesh_of_this_process(mesh)
    settings, expected = _settings(explicit, replay, devices)
    if replay is None and "batch_size" in explicit:
        images = num_images * len(settings["prompt"])
        settings["batch_size"] = common.bounded_batch(explicit["batch_size"], images, devices)
    model, dtype, loras = (settings.pop(name) for name in ("model", "dtype", "loras"))

    watch = common.Stopwatch()
    with watch.stage("load and encode"):
        loaded = common.load_and_encode(
            model,
            settings,
            dtype=dtype,
            num_images=num_images,
            with_fingerprint=metadata,
            mesh=devices,
            offload_modulation=offload_modulation,
            loras=loras,
            revision=revision,
        )
    before, here = None if expected is None else expected.fingerprint, loaded.fingerprint
    if None not in (before, here) and before != here:
        logger.warning(
            "%s is of a model with another configuration, or was drawn with other weights "
            "(fingerprint %s, here %s): the image will differ",
            replay,
            before,
            here,
        )
    if expected is not None:
        _take_kernels(loaded.pipe, expected, replay)
    encoded = ("prompt", "negative_prompt", "max_sequence_length")
    with watch.stage("draw"):
        output = loaded.pipe(
            loaded.prompts,
            negative_prompt=loaded.negative,
            num_images_per_prompt=num_images,
            progress=not quiet,
            **{name: value for name, value in settings.items() if name not in encoded},
        )
    found = output.records[0]
    if expected is not None and _size(expected) == _size(found) and expected.tiled != found.tiled:
        # One of them is as the size says, the other is told.
        here = not expected.tiled if found.tiled is None else found.tiled
        ways = ("whole", "in tiles") if here else ("in tiles", "whole")
        logger.warning("%s was decoded %s, here %s: the image will differ slightly", replay, *ways)
    paths = common.numbered(out, len(output.images))
    for image, path, record in zip(output.images, paths, output.records, strict=True):
        record = dataclasses.replace(record, fingerprint=loaded.fingerprint)
        save_png(image, path, record if metadata else None)
    if as_json:
        images = [
            {"file": str(path), "prompt": record.prompt, "seed": record.seed}
            for path, record in zip(paths, output.records, strict=True)
        ]
        common.print_json(
            {
                "images": images,
                "model": loaded.pipe.name,
                "fingerprint": loaded.fingerprint,
                "seconds": watch.seconds,
                "peak_device_bytes": common.peak_device_bytes(),
            }
        )
    elif not quiet:
        for path, record in zip(paths, output.records, strict=True):
            typer.echo(f"{path}  seed {record.seed}")


def _take_kernels(pipe: FluxPipeline, record: GenerationRecord, replay: Path | None) -> None:
    """The kernels that a record names, if they run here."""
    if record.kernels is None and record.attention is None:
        return
    try:
        pipe.use_kernels(kernels=record.kernels, attention=record.attention)
    except UserError as error:
        logger.warning("%s was drawn by other kernels: %s", replay, error)


def _size(record: GenerationRecord) -> tuple[int, int]:
    return record.height, record.width


def _settings(
    explicit: dict[str, Any], replay: Path | None, mesh: Mesh | None
) -> tuple[dict[str, Any], GenerationRecord | None]:
    """Everything asked for, explicit options over those of the image to replay.

    Returns:
      (settings, expected): keyword arguments of the pipeline's call with "model", "dtype" and
      "loras", and the record of the image to replay, its fingerprint if it is to be the same.
    """
    if replay is None:
        if "prompt" not in explicit:
            raise UserError("give a PROMPT to draw, or --replay IMAGE.png; see --help")
        return {"model": None, "dtype": "bfloat16", "loras": (), **explicit}, None
    from flux_jax.lora import read_name
    from flux_jax.metadata import read_png
    from flux_jax.sharding import axis_size

    record = read_png(replay)
    recorded = {k: v for k, v in record.arguments().items() if v is not None}
    # The record is of one device, on which rounding depends; the argument of all.
    recorded["batch_size"] *= 1 if mesh is None else axis_size(mesh, "data")
    if record.model is None and "model" not in explicit:
        raise UserError(f"{replay} does not say which model drew it: name one with --model")
    if record.model is not None and "model" not in explicit:
        _check_here(replay, "--model", record.model, record.model)
    for lora in () if "loras" in explicit else record.loras:
        _check_here(replay, "--lora", lora, read_name(lora)[0])
    drawn_by = {"model": record.model, "dtype": record.dtype, "loras": record.loras}
    settings = {**recorded, **drawn_by, **explicit}
    # Other weights were asked for: nobody expects the same image.
    if settings["model"] != record.model or tuple(settings["loras"]) != record.loras:
        record = dataclasses.replace(record, fingerprint=None)
    return settings, record


def _check_here(replay: Path, option: str, named: str, place: str) -> None:
    """Refuse what a record names and is not here; to download it unasked: it may be a stranger's.

    Args:
      replay: the image with the record.
      option: that names the same thing.
      named: what the record has for it.
      place: a path, a hub id with or without a file, or a shipped model's name.

    Raises:
      UserError: it is no path, no shipped model, and not in the hub's cache.
    """
    if place in SHIPPED or os.path.exists(os.path.expanduser(place)):
        return
    # A relative path is of the folder that the image was drawn from.
    told = f"{replay} names {named!r}, which is no path from here"
    remedy = f"give {option} with its path"
    repository = "/".join(Path(place).parts[:2])
    if not REPO_ID.fullmatch(repository):
        raise UserError(f"{told}: {remedy}")
    # Late: only a hub id needs it.
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    if not Path(HF_HUB_CACHE, folder, "snapshots").is_dir():
        raise UserError(
            f"{told} and not in the hub's cache; what an image names is not downloaded unasked: "
            f"{remedy}, or, if it is on the hub, {option} {named}"
        )
