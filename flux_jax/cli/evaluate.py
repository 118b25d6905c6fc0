"""`python -m flux_jax evaluate`: a model's composition score, or pictures for other scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flux_jax.cli import benchmarks, common
from pallas_kernels.command_line import App


class _Commands(TyperGroup):
    """The scores; without a name it is the composition score."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name where it was left out."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["composition", *args]
        return super().parse_args(ctx, args)


app = App(
    cls=_Commands, help="Score a model, or draw for a benchmark's own scorer. Alone: composition."
)


@app.command()
@common.naming_options()
def composition(
    model: common.Model = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the images and report.json.")
    ] = Path("evaluation"),
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first LIMIT prompts of each category.", show_default="all"),
    ] = None,
    steps: common.Steps = None,
    guidance: common.Guidance = 3.5,
    seed: Annotated[int, typer.Option(help="Prompt i takes SEED + i.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images drawn together.")] = 16,
    dtype: common.DType = "bf16",
    force: common.Force = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Score a model on prompts that compose.

    Draws the evaluation prompts, none of which were trained on, and judges each image with an exact
    detector on its pixels, in GenEval's six categories: single object, two objects, counting,
    colors, position, color attribution. A run that was stopped goes on where it was; pictures of
    another model or of other settings are replaced with --force alone.

    \b
    Examples:
      python -m flux_jax evaluate composition --out evaluation
      python -m flux_jax evaluate composition --model FOLDER --limit 10 --steps 14 --json
    """
    # Late: JAX takes a second, and --help should not.
    from flux_jax import evaluate as scoring
    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.composition.score import format_table

    enable_compilation_cache()
    prompts = scoring.select_prompts(limit)
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "batch_size": batch_size,
    }
    request = {"prompt": [prompt.prompt for prompt in prompts], "seed": seed, **settings}
    loaded = common.load_and_encode(model, request, dtype=common.dtype_name(dtype))
    result = scoring.evaluate(
        loaded.pipe,
        out,
        prompts=prompts,
        embeds=loaded.prompts,
        seed=seed,
        replace=force,
        progress=not quiet,
        **settings,
    )
    if json:
        common.print_json({"model": loaded.pipe.name, **result.to_dict()})
        return
    typer.echo(format_table(result.scores))
    if not quiet:
        typer.echo(f"images and report: {out}", err=True)


for name, command in benchmarks.COMMANDS.items():
    app.command(name)(command)
