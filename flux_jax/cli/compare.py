"""`python -m flux_jax compare`: this port against PyTorch on the user's own weights."""

from __future__ import annotations

from typing import Annotated

import typer

from flux_jax.cli import common


@common.naming_options()
def compare(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint in diffusers' layout, a Hugging Face repository id, or tiny.",
            show_default=False,
        ),
    ],
    dtype: common.DType = "fp32",
    steps: Annotated[int, typer.Option(help="Denoising steps of the image.")] = 4,
    height: Annotated[
        int | None,
        typer.Option(help="Of the image, in pixels.", show_default="the model's, at most 512"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Of the image, in pixels.", show_default="the model's, at most 512"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the image's noise.")] = 0,
    json: common.Json = False,
) -> None:
    """Compare with PyTorch on one checkpoint.

    Runs this port, and diffusers and transformers, on the same inputs. Prints the error of each
    component and the PSNR of one image drawn from the same noise; exit code 1 if one is beyond
    what rounding explains. Components are loaded one at a time: memory for the largest is enough
    (FLUX.1-dev: 48 GB in fp32, 24 GB in bf16; the host's, unless there is a GPU).

    Needs torch and diffusers: pip install 'flux-jax[parity]'.

    \b
    Examples:
      python -m flux_jax compare tiny
      python -m flux_jax compare black-forest-labs/FLUX.1-dev --dtype bf16 --steps 28
    """
    # Late: JAX takes a second, and --help should not.
    from flux_jax import compare as comparison
    from flux_jax.compile_cache import enable_compilation_cache

    enable_compilation_cache()
    found = []
    for finding in comparison.compare(
        model,
        dtype=common.dtype_name(dtype),
        height=height,
        width=width,
        num_inference_steps=steps,
        seed=seed,
    ):
        found.append(finding)
        if not json:
            typer.echo(comparison.format_line(finding))
    passed = all(finding.passed for finding in found)
    if json:
        common.print_json(comparison.report(model, dtype, found))
    if not passed:
        raise typer.Exit(1)
