"""The command line: `python -m convert SRC DST`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_jax.errors import UserError, exit_on_user_error

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    src: Annotated[
        str,
        typer.Argument(
            help="A diffusers folder or hub id, a Black Forest Labs .safetensors file, or a Flax "
            "checkpoint.",
            show_default=False,
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to be made.", show_default=False)],
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing checkpoint, once the new is whole.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no summary.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)
    ] = None,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="Largest file of a diffusers folder, in MB.")
    ] = 9900,
) -> None:
    """Convert FLUX.1 weights between Hugging Face, Black Forest Labs and Flax.

    The target is written beside its place and renamed when it is whole: a run that is killed
    leaves no half checkpoint. Tensors are streamed; peak memory stays far below the model's size.
    """
    with exit_on_user_error():
        _run(
            src,
            dst,
            names=None if components is None else _names(components),
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
    quiet: bool,
    revision: str | None,
    **options: Any,
) -> None:
    # Late: JAX takes a second, and --help should not.
    from tqdm import tqdm

    from convert import atomic, engine, hub

    # Before a download of tens of gigabytes.
    atomic.check_target(dst, force=options["force"], replaceable=engine.is_checkpoint)
    path = hub.resolve(src, names, revision=revision)
    with contextlib.ExitStack() as stack:
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
            path, dst, components=names, on_start=start, on_bytes=advance, **options
        )
    if quiet:
        return
    for component, tensor, reason in summary.dropped:
        typer.echo(f"left out: {tensor} of {component}: {reason}", err=True)
    checked = f", {summary.verified} tensors verified" if summary.verified else ""
    typer.echo(
        f"{summary.path}: {', '.join(summary.components)}, {summary.nbytes / 1e9:.2f} GB{checked}",
        err=True,
    )
