"""The command line. Nothing heavy is imported until a command runs, so `--help` is quick."""

from __future__ import annotations

from flux_jax.cli import compare, demo, evaluate, generate, info
from pallas_kernels.command_line import App, before_commands

app = App(name="flux_jax", help="FLUX.1 in JAX: images from text.", no_args_is_help=True)
app.callback()(before_commands)
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
    app()
