"""Draws a benchmark with several models from the same noise, each into a folder of its own.

Picture i of every prompt has seed `seed + i`, whichever the model: as in the published scripts, the
prompts of a benchmark share their noise. A model's folder has a manifest of what it holds; a call
that was stopped goes on where it was, and one with other settings is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from flux_jax import loading
from flux_jax.drawing import Job, draw
from flux_jax.errors import UserError
from flux_jax.files import make_folder, partial_paths, write_whole
from flux_jax.json_values import parse_json
from flux_jax.pipeline import FluxPipeline
from flux_jax.plan import Plan
from flux_jax.processes import Processes
from flux_jax.residence import STREAMED
from flux_jax.scorers.layout import Item, Layout

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is drawn, whichever model draws it.

    Attributes:
      layout: of the benchmark.
      prompts: the published file.
      items: its prompts.
      samples: pictures of each.
      seed: of the first of them.
      settings: keyword arguments of the pipeline's call.
    """

    layout: Layout
    prompts: Path
    items: Sequence[Item]
    samples: int
    seed: int
    settings: Mapping[str, Any]

    def jobs(self) -> list[Job]:
        """Every picture, prompt by prompt."""
        return [
            Job(
                prompt=item.prompt,
                seed=self.seed + sample,
                file=self.layout.file(index, item, sample, self.samples),
            )
            for index, item in enumerate(self.items)
            for sample in range(self.samples)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model's pictures.

    Attributes:
      model: as it was named.
      folder: of its pictures.
      images: how many there are.
      drawn: how many of them this call drew.
      commands: that score them, in the scorer's checkout.
    """

    model: str
    folder: Path
    images: int
    drawn: int
    commands: tuple[str, ...]


def folder_names(models: Sequence[str]) -> list[str]:
    """A folder's name for each model: the last part of its own name.

    Raises:
      UserError: two models would share one, or one has no name.
    """
    names = []
    for model in models:
        path = Path(os.path.expanduser(model))
        # "." and ".." say what they are called only once they are followed.
        name = path.resolve().name if path.name in ("", "..") else path.name
        if not name:
            raise UserError(f"{model} has no name that its folder of pictures could have")
        names.append(name)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models would be drawn into the folder {name!r}: rename one")
    return names


def check_model(task: Task, model: str | None, *, mesh: Mesh | None = None) -> loading.Request:
    """See that a model can draw a task, before it or another one draws anything.

    Args:
      task, model, mesh: as for `draw_model`.

    Raises:
      UserError: a setting out of its range, or no whole pipeline.
    """
    checked = {**task.settings, "seed": task.seed + task.samples - 1}
    request = loading.check_request(model, checked, images=1, num_images_per_prompt=1, mesh=mesh)
    plan = request.plan
    if task.layout.square and plan.height != plan.width:
        raise UserError(
            f"{task.layout.title} cuts squares: height and width must be the same, got "
            f"{plan.height} and {plan.width}"
        )
    return request


def draw_model(
    task: Task,
    model: str | None,
    folder: Path,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    progress: bool = True,
    processes: Processes,
) -> Drawn:
    """Draw what is missing of one model's pictures, and lay out the rest for the scorer.

    Args:
      task: what is drawn.
      model: as for `flux_jax.loading.check_request`.
      folder: of its pictures; made if absent.
      dtype: "bfloat16" or "float32".
      mesh: devices of this process to draw on; by default one.
      progress: whether to show a progress bar on stderr.
      processes: among which the pictures are divided.

    Raises:
      UserError: a setting out of its range, or a folder of another evaluation.
    """
    jobs = task.jobs()
    request = check_model(task, model, mesh=mesh)
    plan = request.plan
    # Prompts are encoded by and by: T5 stays in its files meanwhile.
    pipe = FluxPipeline.from_pretrained(
        request.path, name=request.name, dtype=dtype, mesh=mesh, text_encoders=STREAMED
    )
    weights = {"model": request.name, "fingerprint": pipe.fingerprint(), "dtype": dtype}
    manifest = _manifest(task, plan, **weights)
    if processes.first:
        _claim(folder, manifest)
    processes.wait("manifest")
    drawn = draw(
        pipe,
        jobs,
        folder,
        settings=task.settings,
        progress=progress,
        processes=processes,
    )
    commands = task.layout.commands(
        folder.absolute(), task.prompts, samples=task.samples, side=plan.height
    )
    _finish(task, folder, processes)
    if processes.first:
        images = [dataclasses.asdict(job) for job in jobs]
        _write(folder, {**manifest, "complete": True, "commands": commands, "images": images})
    return Drawn(
        model=request.name, folder=folder, images=len(jobs), drawn=drawn, commands=tuple(commands)
    )


def _finish(task: Task, folder: Path, processes: Processes) -> None:
    """What stands beside the pictures; each process does its share, on all cores."""

    def one(index: int) -> None:
        item = task.items[index]
        files = [task.layout.file(index, item, i, task.samples) for i in range(task.samples)]
        task.layout.finish(folder, item, [folder / file for file in files])

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(one, range(processes.index, len(task.items), processes.count)):
            pass
    processes.wait("layout")


def _manifest(task: Task, plan: Plan, **weights: str) -> dict[str, Any]:
    """What a folder's pictures are of, and all that they depend on."""
    return {
        "benchmark": task.layout.title,
        "layout": task.layout.source,
        "prompts": len(task.items),
        "prompts_sha256": _digest(task.items),
        "samples": task.samples,
        "seed": task.seed,
        **weights,
        "num_inference_steps": plan.schedule.num_steps,
        "guidance_scale": plan.guidance_scale,
        "height": plan.height,
        "width": plan.width,
        "max_sequence_length": plan.max_sequence_length,
    }


def _digest(items: Sequence[Item]) -> str:
    """A digest of names and prompts, wherever the file lies."""
    text = json.dumps([[item.name, item.prompt, item.metadata] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()


def _claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Say what the folder is for, or see that it is for this.

    Args:
      folder: of the pictures.
      manifest: what is asked for.

    Raises:
      UserError: it is for something else, or cannot be written to.
    """
    path = folder / MANIFEST
    try:
        before = parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        # A process that was killed may have left its half.
        if folder.is_dir() and set(folder.iterdir()) - partial_paths(path):
            raise UserError(
                f"{folder} is not empty and has no {MANIFEST}: choose another folder"
            ) from None
        _write(folder, {**manifest, "complete": False})
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(before, dict):
        raise UserError(f"{path} is no manifest of ours: choose another folder")
    for name, value in manifest.items():
        # The same weights may lie elsewhere by now.
        if name != "model" and before.get(name) != value:
            raise UserError(
                f"{folder} holds pictures with {name} {before.get(name)!r}, where {value!r} is "
                "asked for: choose another folder, or remove this one"
            )


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    make_folder(folder)
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
