"""`python -m flux_jax info`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from flux_jax.cli import common


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="tiny, a folder, a .safetensors file or a repository id."
        ),
    ] = "tiny",
    json: common.Json = False,
) -> None:
    """Show what a checkpoint holds.

    Components, parameters, sizes, types and configurations, read from the headers alone.

    \b
    Examples:
      python -m flux_jax info
      python -m flux_jax info FOLDER --json
    """
    with common.command(quiet=False):
        content = describe(model)
        if json:
            common.print_json(content)
        else:
            typer.echo("\n".join(_lines(content)))


def describe(model: str) -> dict[str, Any]:
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
    return lines
