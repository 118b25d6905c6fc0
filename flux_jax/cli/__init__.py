"""The command line. Nothing heavy is imported until a command runs, so `--help` is quick."""

from __future__ import annotations

import typer

from flux_jax.cli import compare, demo, evaluate, generate, info

app = typer.Typer(
    name="flux_jax",
    help="FLUX.1 in JAX: images from text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    generate.generate,
    demo.demo,
    info.info,
    compare.compare,
):
    app.command()(command)
app.add_typer(evaluate.app, name="evaluate")


def main() -> None:
    """Entry point of `python -m flux_jax` and of the `flux-jax` script."""
    app(prog_name="python -m flux_jax")
