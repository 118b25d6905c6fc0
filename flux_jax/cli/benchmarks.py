"""`python -m flux_jax evaluate geneval|compbench|dpg`: pictures for the official scorers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flux_jax.assets import DEFAULT_MODEL
from flux_jax.cli import common

if TYPE_CHECKING:
    from flux_jax.scorers.layout import Layout
    from flux_jax.scorers.run import Drawn

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="As for generate; give teacher and student, one --model each: they start from the "
        "same noise.",
        show_default=DEFAULT_MODEL,
    ),
]
Prompts = Annotated[
    Path,
    typer.Option(metavar="FILE", help="The benchmark's own prompt file.", show_default=False),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="A folder for each model, OUT/NAME. A call that was stopped goes on.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Image i of each prompt takes SEED + i.")]
NumImages = Annotated[
    int | None, typer.Option(help="Images of each prompt.", show_default="as published")
]


_HELP = {
    "geneval": """Draw GenEval's prompts as its scorer expects them: 4 images of each.

    FILE is prompts/evaluation_metadata.jsonl of GenEval. The commands that score are printed.

    \b
    Examples:
      python -m flux_jax evaluate geneval --prompts evaluation_metadata.jsonl --out geneval \\
        --model ~/flux-dev --model run/student
      srun python -m flux_jax evaluate geneval --prompts evaluation_metadata.jsonl \\
        --out geneval --model run/student --distributed
    """,
    "compbench": """Draw a category of T2I-CompBench as its scorers expect it: 10 images a prompt.

    FILE is one of examples/dataset/*_val.txt of T2I-CompBench; give each category an OUT of its
    own. The commands that score are printed.

    \b
    Examples:
      python -m flux_jax evaluate compbench --prompts color_val.txt --out compbench/color \\
        --model ~/flux-dev --model run/student
    """,
    "dpg": """Draw DPG-Bench's prompts as its scorer expects them: 4 images of each, two by two.

    FILE is the folder dpg_bench/prompts of ELLA, or its dpg_bench.csv. The commands that score are
    printed.

    \b
    Examples:
      python -m flux_jax evaluate dpg --prompts dpg_bench/prompts --out dpg \\
        --model ~/flux-dev --model run/student
    """,
}


def _layout(name: str) -> Layout:
    # Late: --help should be quick.
    from flux_jax.scorers.compbench import CompBench
    from flux_jax.scorers.dpg import DPGBench
    from flux_jax.scorers.geneval import GenEval

    return {"geneval": GenEval, "compbench": CompBench, "dpg": DPGBench}[name]()


def _command(benchmark: str) -> Callable[..., None]:
    """The command of one benchmark; all have the same options."""

    @common.naming_options()
    def command(
        prompts: Prompts,
        out: Out,
        model: Models = None,
        num_images: NumImages = None,
        seed: Seed = 0,
        steps: common.Steps = None,
        guidance: common.Guidance = 3.5,
        height: common.Side = None,
        width: common.Side = None,
        max_sequence_length: common.Length = None,
        batch_size: common.BatchSize = None,
        dtype: common.DType = "bf16",
        mesh: common.MeshOption = None,
        distributed: common.Distributed = False,
        json: common.Json = False,
        quiet: common.Quiet = False,
    ) -> None:
        # Late: JAX takes a second, and --help should not.
        from flux_jax import arguments
        from flux_jax.compile_cache import enable_compilation_cache
        from flux_jax.processes import Processes, joined_processes
        from flux_jax.scorers.run import Task, check_model, draw_model, folder_names

        enable_compilation_cache()
        layout = _layout(benchmark)
        samples = layout.samples if num_images is None else num_images
        layout.check(arguments.integer("num_images", samples))
        settings = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
            "max_sequence_length": max_sequence_length,
            "batch_size": batch_size,
        }
        task = Task(
            layout=layout,
            prompts=prompts,
            items=layout.read(prompts),
            samples=samples,
            seed=arguments.integer("seed", seed, least=0),
            settings={name: value for name, value in settings.items() if value is not None},
        )
        models = model or [None]
        folders = folder_names([each or DEFAULT_MODEL for each in models])
        options = {"dtype": common.dtype_name(dtype), "progress": not quiet}
        job = joined_processes() if distributed else contextlib.nullcontext(Processes())
        with job as processes:
            devices = common.mesh_of_this_process(mesh)
            for each in models:
                check_model(task, each, mesh=devices)
            reports = [
                draw_model(task, each, out / folder, mesh=devices, processes=processes, **options)
                for each, folder in zip(models, folders, strict=True)
            ]
        if processes.first:
            _tell(layout, reports, as_json=json, quiet=quiet)

    command.__doc__ = _HELP[benchmark]
    return command


def _tell(layout: Layout, reports: Sequence[Drawn], *, as_json: bool, quiet: bool) -> None:
    """What was drawn, and the commands that score it."""
    if as_json:
        models = [{**vars(report), "folder": str(report.folder)} for report in reports]
        common.print_json({"benchmark": layout.title, "source": layout.source, "models": models})
        return
    for report in reports:
        if not quiet:
            counts = f"{report.images} images, {report.drawn} drawn now"
            typer.echo(f"{report.folder}  {counts}; in a checkout of {layout.source}:", err=True)
        for line in report.commands:
            typer.echo(line)


COMMANDS = {benchmark: _command(benchmark) for benchmark in _HELP}
