"""The command line: `python -m convert SRC DST`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_jax.errors import UserError
from pallas_kernels.command_line import App, Force, Json, Quiet, Version, print_json

app = App(name="convert")


@app.command()
def main(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="tiny, a diffusers folder or hub id, a Black Forest Labs .safetensors file, or a "
            "Flax checkpoint.",
            show_default=False,
        ),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to be made.", show_default=False)
    ],
    components: Annotated[
        str | None,
        typer.Option(
            help="Only these, separated by commas: transformer, text_encoder, text_encoder_2, vae.",
            show_default="all there are",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16, fp16, fp32, or keep (float8 becomes bf16).")
    ] = "bf16",
    to: Annotated[
        str, typer.Option(help="flax (Orbax), diffusers (folder) or bfl (single files).")
    ] = "flax",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the target again and compare checksums.")
    ] = False,
    force: Force = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)
    ] = None,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="Largest file of a diffusers folder, in MB.")
    ] = 9900,
    json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Convert FLUX.1 weights between Hugging Face, Black Forest Labs and Flax.

    The target is written beside its place and renamed when it is whole: a run that is killed
    leaves no half checkpoint. Tensors are streamed; peak memory stays far below the model's size.

    \b
    Examples:
      python -m convert black-forest-labs/FLUX.1-dev ~/flux-dev
      python -m convert flux1-dev-fp8.safetensors ~/flux-dev --components transformer --verify
      python -m convert ~/flux-dev ~/back --to diffusers --dtype keep
    """
    del version  # told before anything else is looked at
    _run(
        src,
        dst,
        names=None if components is None else _names(components),
        as_json=json,
        quiet=quiet,
        revision=revision,
        dtype=dtype,
        to=to,
        verify=verify,
        force=force,
        shard_bytes=shard_mb * 10**6,
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--components names none; give at least one, or leave the option out")
    return list(dict.fromkeys(names))


def _run(
    src: str,
    dst: Path,
    *,
    names: list[str] | None,
    as_json: bool,
    quiet: bool,
    revision: str | None,
    **options: Any,
) -> None:
    # Late: JAX takes a second, and --help should not.
    from tqdm import tqdm

    from convert import engine
    from flux_jax.cli.common import naming_options

    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_options())
        bars: list[tqdm] = []

        def start(nbytes: int) -> None:
            bar = tqdm(
                total=nbytes,
                unit="B",
                unit_scale=True,
                desc="convert",
                disable=quiet,
                file=sys.stderr,
            )
            bars.append(stack.enter_context(bar))

        def advance(nbytes: int) -> None:
            bars[0].update(nbytes)

        summary = engine.convert(
            src,
            dst,
            components=names,
            revision=revision,
            on_start=start,
            on_bytes=advance,
            **options,
        )
    if not quiet:
        for component, tensor, reason in summary.dropped:
            typer.echo(f"left out: {tensor} of {component}: {reason}", err=True)
        for component in summary.unpacked:
            typer.echo(
                f"{component}: packed codes became dense weights; nothing makes codes of them "
                "again",
                err=True,
            )
    if as_json:
        print_json({**dataclasses.asdict(summary), "path": str(summary.path)})
    elif not quiet:
        checked = f", {summary.verified} tensors verified" if summary.verified else ""
        size = f"{summary.nbytes / 1e9:.2f} GB"
        typer.echo(f"{summary.path}: {', '.join(summary.components)}, {size}{checked}")
