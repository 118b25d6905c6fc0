"""`python -m flux_jax generate --prompts FILE`: an image for each line, into a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from flux_jax.cli import common

# Digits of a line's number in its file's name: the same however many lines there are.
_DIGITS = 5


def generate_many(
    prompt_file: Path,
    out: Path,
    explicit: Mapping[str, Any],
    *,
    num_images: int,
    revision: str | None,
    mesh: str | None,
    distributed: bool,
    offload_modulation: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw every prompt of a file; what is drawn already is left alone.

    Args:
      prompt_file: a prompt a line.
      out: folder of the images, 00000.png or 00000-0.png.
      explicit: the options that were given.
      num_images: images of each prompt; image i of all takes seed + i.
      revision: as in `common.Revision`.
      mesh: as in `common.MeshOption`.
      distributed: whether to join the other processes of this job.
      offload_modulation: as in `FluxPipeline`.
      as_json, quiet: as for every command.

    Raises:
      UserError: the file cannot be read, `out` cannot be written to, or as
        `flux_jax.drawing.draw`.
    """
    # Late: JAX takes a second, and --help should not.
    from flux_jax import arguments, drawing, loading
    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.files import make_folder
    from flux_jax.pipeline import FluxPipeline
    from flux_jax.processes import Processes, joined_processes
    from flux_jax.prompt_file import read_prompts
    from flux_jax.residence import STREAMED

    settings = {"seed": 0, **explicit}
    model = settings.pop("model", None)
    dtype = settings.pop("dtype", "bfloat16")
    loras = settings.pop("loras", ())
    prompts = read_prompts(prompt_file)
    count = arguments.integer("num_images", num_images)
    seed = arguments.integer("seed", settings.pop("seed"), least=0)
    jobs = [
        drawing.Job(
            prompt=prompt,
            seed=seed + line * count + number,
            file=f"{line:0{_DIGITS}d}{f'-{number}' if count > 1 else ''}.png",
        )
        for line, prompt in enumerate(prompts)
        for number in range(count)
    ]
    enable_compilation_cache()
    watch = common.Stopwatch()
    job = joined_processes() if distributed else contextlib.nullcontext(Processes())
    with job as processes:
        with watch.stage("load"):
            devices = common.mesh_of_this_process(mesh)
            if "batch_size" in settings:
                batch = settings["batch_size"]
                settings["batch_size"] = common.bounded_batch(batch, len(jobs), devices)
            checked = {**settings, "seed": jobs[-1].seed}
            request = loading.check_request(
                model,
                checked,
                images=1,
                num_images_per_prompt=1,
                mesh=devices,
                loras=loras,
                revision=revision,
            )
            # Checked, with a warning if it has no effect; `drawing` then leaves it out.
            common.negative_prompt(settings, request.plan, quiet=not processes.first)
            if processes.first:
                make_folder(out)
                common.check_folder_of("--out", out / jobs[0].file)
            # Prompts are encoded by and by: T5 stays in its files meanwhile.
            pipe = FluxPipeline.from_pretrained(
                request.path,
                name=request.name,
                dtype=dtype,
                mesh=devices,
                text_encoders=STREAMED,
                offload_modulation=offload_modulation,
            )
            # What was read of them goes as they come to the device.
            loras = list(request.loras)
            del request
            while loras:
                pipe.add_lora(loras.pop(0))
        with watch.stage("draw"):
            drawn = drawing.draw(
                pipe, jobs, out, settings=settings, progress=not quiet, processes=processes
            )
        if not processes.first:
            return
        if as_json:
            common.print_json(
                {
                    "out": str(out),
                    "images": len(jobs),
                    "drawn": drawn,
                    "model": pipe.name,
                    "fingerprint": pipe.fingerprint(),
                    "seconds": watch.seconds,
                    "peak_device_bytes": common.peak_device_bytes(),
                }
            )
        elif not quiet:
            typer.echo(f"{out}  {len(jobs)} images, {drawn} drawn now")
