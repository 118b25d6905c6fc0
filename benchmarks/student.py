"""The shipped 1.58-bit student beside its teacher: composition score, and image against image.

    python -m benchmarks.student --images student

Every held-out prompt is drawn by the teacher, by the student with 16-bit and with 8-bit
activations, and by the teacher rounded to the same format without training, each from the same
noise. About half an hour on two CPU cores; a stopped run is resumed. A prompt more or less is a
seventh of a percent: `--noises 4` draws each four times, as GenEval does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from PIL import Image

from benchmarks.common import Commit, Figure, OutOrNone, Peer, Result, results_folder, run
from benchmarks.composition import GUIDANCE
from benchmarks.composition import figures as score_figures
from benchmarks.machine import git_commit, package_versions
from benchmarks.processes import folder_bytes
from flux_jax.assets import STUDENT, TEACHER, shipped_path
from flux_jax.evaluate import Evaluation, evaluate, file_name, select_prompts
from flux_jax.images import psnr
from flux_jax.linears import linears
from flux_jax.pipeline import FluxPipeline
from flux_jax.tree import to_flat
from ternary.layers import TernaryLinear
from ternary.policy import Policy
from ternary.storage.checkpoint import open_checkpoint
from ternary.storage.saving import save_checkpoint
from ternary.student import freeze_student, make_student

TEACHER_NAME = "teacher, bf16"


def eight_bit(transformer: Any) -> Any:
    """The same weights with int8 activations."""
    for layer in linears(transformer, TernaryLinear).values():
        layer.activation_bits = 8
    return transformer


def rounded(teacher: FluxPipeline, folder: Path) -> Any:
    """The teacher's weights in the student's format, by the absolute mean alone; also on disk."""
    with open_checkpoint(shipped_path(STUDENT)) as student:
        policy, quant = Policy(include=tuple(student.layers)), student.description.quant
    transformer = freeze_student(make_student(teacher.transformer, quant, policy))
    save_checkpoint(folder, transformer, rest=shipped_path(TEACHER), force=True)
    return transformer


def pictures(folder: Path, count: int) -> np.ndarray:
    """The drawn images, (N, H, W, 3) in [0, 1]."""
    images = []
    for index in range(count):
        with Image.open(folder / file_name(index)) as image:
            images.append(np.asarray(image.convert("RGB"), np.float32) / 255)
    return np.stack(images)


def main(
    images: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("student"),
    limit: Annotated[
        int | None, typer.Option(help="Only the first LIMIT prompts of each category.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = GUIDANCE,
    noises: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn together.")] = 16,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Draw, score and compare; write the result file."""
    trial = {"--limit": limit is not None, "--guidance": guidance != GUIDANCE}
    target = results_folder(out, trial)
    teacher = FluxPipeline.from_pretrained(TEACHER)
    once = select_prompts(limit)
    embeds = teacher.encode_prompt([prompt.prompt for prompt in once])
    prompts = once * noises
    parameters = sum(value.size for value in to_flat(teacher.transformer).values())

    def student() -> Any:
        return FluxPipeline.from_pretrained(STUDENT).transformer

    plain = images / "rounded_checkpoint"
    images.mkdir(parents=True, exist_ok=True)
    models = {
        TEACHER_NAME: (teacher.transformer, shipped_path(TEACHER)),
        "W1.58A16": (student(), shipped_path(STUDENT)),
        "W1.58A8": (eight_bit(student()), shipped_path(STUDENT)),
        "rounded, not trained": (rounded(teacher, plain), plain),
    }
    columns: dict[str, dict[str, Figure]] = {}
    drawn: dict[str, np.ndarray] = {}
    found: dict[str, Evaluation] = {}
    for name, (transformer, folder) in models.items():
        pipe = FluxPipeline(
            transformer=transformer,
            vae=teacher.vae,
            scheduler=teacher.scheduler,
            text_encoders=teacher.text_encoders,
            name=name,
        )
        place = images / name.split(",")[0].replace(".", "")
        found[name] = evaluate(
            pipe,
            place,
            prompts=prompts,
            embeds=embeds,
            guidance_scale=guidance,
            batch_size=batch_size,
        )
        drawn[name] = pictures(place, len(prompts))
        size = folder_bytes(folder / "transformer")
        columns[name] = {
            **score_figures(found[name].scores),
            "kept": Figure(
                value=found[name].scores.overall.passed / found[TEACHER_NAME].scores.overall.passed,
                unit="share",
            ),
            "megabytes": Figure(value=size / 1e6, unit="MB"),
            "bits": Figure(value=8 * size / parameters, unit="bit"),
        }
        if name != TEACHER_NAME:
            apart = psnr(drawn[name], drawn[TEACHER_NAME])
            columns[name] |= {
                "median_psnr": Figure(value=float(np.median(apart)), unit="dB"),
                "low_psnr": Figure(value=float(np.percentile(apart, 10)), unit="dB"),
            }
    versions = package_versions("jax", "flax", "numpy")
    result = Result(
        benchmark="student",
        device=jax.devices()[0].device_kind,
        figures=columns.pop("W1.58A16"),
        peers={name: Peer(versions=versions, figures=those) for name, those in columns.items()},
        commit=commit or git_commit(),
    )
    for name, figure in result.figures.items():
        print(f"  {name:32} {figure.value:8.4g} {figure.unit:5} {figure.note}")
    if target is not None:
        print(f"written: {result.write(target).name}")


if __name__ == "__main__":
    run(main)
