"""`python -m flux_jax info`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_jax.assets import DEFAULT_MODEL, shipped_path
from flux_jax.cli import common
from flux_jax.errors import UserError


@common.naming_options()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="tiny-ternary, tiny, a folder, a .safetensors file or a repository id.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Also compile each stage for this device and tell what memory it will need.",
        ),
    ] = False,
    height: Annotated[
        int | None, typer.Option(help="For --memory, pixels.", show_default="the model's own")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="For --memory, pixels.", show_default="the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="For --memory, images drawn together.")] = 1,
    dtype: Annotated[str, typer.Option(help="For --memory, bf16 or fp32.")] = "bf16",
    text_encoders: Annotated[
        str,
        typer.Option(
            help="For --memory: streamed (as generate does), offloaded, or resident on the device."
        ),
    ] = "streamed",
    offload_modulation: Annotated[
        bool,
        typer.Option("--offload-modulation", help="For --memory, as of generate."),
    ] = False,
    tiled: Annotated[
        bool, typer.Option("--tiled", help="For --memory: the decoder works in tiles.")
    ] = False,
    json: common.Json = False,
) -> None:
    """Show what a checkpoint holds.

    Components, parameters, sizes, types and configurations, read from the headers alone; a
    repository that is not in the hub's cache is downloaded first.

    \b
    Examples:
      python -m flux_jax info
      python -m flux_jax info FOLDER --json
      python -m flux_jax info black-forest-labs/FLUX.1-dev --memory --height 768
    """
    settings = {
        "--height": height is not None,
        "--width": width is not None,
        "--batch-size": batch_size != 1,
        "--dtype": dtype != "bf16",
        "--text-encoders": text_encoders != "streamed",
        "--offload-modulation": offload_modulation,
        "--tiled": tiled,
    }
    for name, used in settings.items():
        if used and not memory:
            raise UserError(f"{name} goes with --memory")
    place = shipped_path(DEFAULT_MODEL) if model is None else model
    content = describe(place)
    if memory:
        content["memory"] = _memory(
            place,
            {"height": height, "width": width, "batch_size": batch_size},
            dtype=common.dtype_name(dtype),
            text_encoders=text_encoders,
            offload_modulation=offload_modulation,
            tiled=tiled or None,
        )
    if json:
        common.print_json(content)
    else:
        typer.echo("\n".join(_lines(content)))


def describe(model: str | Path) -> dict[str, Any]:
    """The content of a checkpoint as JSON values.

    Raises:
      UserError: no checkpoint that can be read.
    """
    from flux_jax.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(model)
    components = {
        name: {
            "parameters": part.parameters,
            "bytes": part.nbytes,
            "dtypes": sorted(part.dtypes),
            "config": dataclasses.asdict(part.config),
        }
        for name, part in found.components.items()
    }
    return {
        "path": str(found.path),
        "layout": found.kind,
        "components": components,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(part["bytes"] for part in components.values()),
        "scheduler": None if found.scheduler is None else dataclasses.asdict(found.scheduler),
        "tokenizers": sorted(found.tokenizer_paths),
    }


def _memory(
    model: str | Path, settings: dict[str, Any], *, dtype: str, **choices: Any
) -> dict[str, Any]:
    """Bytes of each stage of a call, and the largest; `choices` are those of `stage_memory`."""
    import jax

    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.loading import check_request
    from flux_jax.memory import stage_memory

    enable_compilation_cache()
    request = check_request(model, settings, images=1, num_images_per_prompt=1)
    models = {name: make(jax.numpy.dtype(dtype)) for name, make in request.abstract.items()}
    stages = stage_memory(models, request.plan, **choices)
    return {
        "device": jax.devices()[0].device_kind,
        "height": request.plan.height,
        "width": request.plan.width,
        "stages": {
            name: {
                "weights": need.weights,
                "work": need.work,
                "held": need.held,
                "peak": need.peak,
            }
            for name, need in stages.items()
        },
        "peak": max(need.peak for need in stages.values()),
    }


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    size = f"{memory['width']} x {memory['height']}"
    lines = ["", f"memory on {memory['device']} for {size} pixels, in MB"]
    titles = ("weights", "work", "held", "peak")
    lines.append(f"{'stage':16}" + "".join(f"{title:>12}" for title in titles))
    for name, need in memory["stages"].items():
        cells = (f"{need[key] / 1e6:,.1f}" for key in titles)
        lines.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(f"{'largest':52}{memory['peak'] / 1e6:>12,.1f}")
    return lines


def _lines(content: dict[str, Any]) -> list[str]:
    """The same as text: a table, then each configuration on a line."""
    lines = [f"{content['path']} ({content['layout']} layout)", ""]
    lines.append(f"{'component':16}{'parameters':>16}{'size':>12}  type")
    for name, part in content["components"].items():
        size = f"{part['bytes'] / 1e6:.1f} MB"
        types = ", ".join(part["dtypes"])
        lines.append(f"{name:16}{part['parameters']:>16,}{size:>12}  {types}")
    total = f"{content['bytes'] / 1e6:.1f} MB"
    lines += [f"{'total':16}{content['parameters']:>16,}{total:>12}", ""]
    configs = {name: part["config"] for name, part in content["components"].items()}
    for name, config in {**configs, "scheduler": content["scheduler"] or {}}.items():
        lines.append(f"{name}: {', '.join(f'{k}={v}' for k, v in config.items()) or 'none'}")
    lines.append(f"tokenizers: {', '.join(content['tokenizers']) or 'none'}")
    return lines + (_memory_lines(content["memory"]) if "memory" in content else [])
