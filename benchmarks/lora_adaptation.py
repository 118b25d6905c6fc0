"""What a teacher's LoRA does to its 1.58-bit student: as it is, adapted, and trained beside it.

    python -m examples.tiny_flux.style --out night.safetensors
    python -m examples.tiny_flux.scenes --count 8192 --seed 17 --prompts prompts.txt
    python -m ternary adapt --teacher tiny --student tiny-ternary --lora night.safetensors \\
        --prompts prompts.txt --out adapted
    python -m examples.tiny_flux.style --model tiny-ternary --out own.safetensors
    python -m benchmarks.lora_adaptation --lora night.safetensors \\
        --adapted adapted/lora.safetensors --own own.safetensors

Held-out prompts are drawn by the teacher with the LoRA and by the student with each, from the same
noise. Some twenty minutes on two CPU cores, most of them training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks.common import Commit, Figure, OutOrNone, Result, results_folder, run
from benchmarks.machine import device_figures, git_commit
from flux_jax.evaluate import select_prompts
from flux_jax.images import psnr
from flux_jax.pipeline import FluxPipeline

# As many as a row of the picture has.
SHOWN = 8


def draw(pipe: FluxPipeline, lora: Path | None, prompts: list[str], steps: int) -> np.ndarray:
    """Pictures (N, H, W, 3) in [0, 1], each prompt's from noise of its own."""
    if lora is not None:
        pipe.load_lora(lora)
    drawn = pipe(
        prompts,
        seed=list(range(len(prompts))),
        num_inference_steps=steps,
        output_type="np",
        progress=False,
    ).images
    pipe.unload_loras()
    return np.asarray(drawn)


def main(
    lora: Annotated[Path, typer.Option(help="Made for the teacher.")],
    adapted: Annotated[Path, typer.Option(help="By `python -m ternary adapt`.")],
    own: Annotated[Path | None, typer.Option(help="Trained beside the student.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each category.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps.")] = 28,
    image: Annotated[Path | None, typer.Option(help="A PNG with some of the pictures.")] = None,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Draw, compare, and write the result file."""
    target = results_folder(out, {"--limit": limit != 8, "--steps": steps != 28})
    prompts = [prompt.prompt for prompt in select_prompts(limit)]
    teacher = FluxPipeline.from_pretrained("tiny")
    student = FluxPipeline.from_pretrained("tiny-ternary", text_encoders=teacher.text_encoders)
    rows: dict[str, tuple[FluxPipeline, Path | None]] = {
        "teacher, the LoRA": (teacher, lora),
        "teacher, without": (teacher, None),
        "student, without": (student, None),
        "student, the teacher's LoRA": (student, lora),
        "student, the LoRA adapted": (student, adapted),
    }
    if own is not None:
        rows["student, a LoRA trained beside it"] = (student, own)
    pictures = {name: draw(pipe, path, prompts, steps) for name, (pipe, path) in rows.items()}
    wanted = pictures["teacher, the LoRA"]
    found: dict[str, Figure] = {}
    for name, drawn in pictures.items():
        found[f"{name}/light"] = Figure(
            value=float(drawn.mean()), unit="share", note="mean of all pixels, 1 is white"
        )
        if drawn is not wanted:
            apart = psnr(drawn, wanted)
            found[f"{name}/psnr"] = Figure(
                value=float(np.median(apart)), unit="dB", note=f"median of {len(prompts)} pictures"
            )
    for name, figure in found.items():
        print(f"  {name:40} {figure.value:8.4g} {figure.unit}")
    if image is not None:
        chosen = np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts))).astype(int)
        strips = [np.concatenate(list(drawn[chosen]), axis=1) for drawn in pictures.values()]
        grid = np.round(255 * np.concatenate(strips, axis=0)).astype(np.uint8)
        Image.fromarray(grid).save(image)
    result = Result(
        benchmark="lora_adaptation",
        device=device_figures()["device"],
        figures=found,
        commit=commit or git_commit(),
    )
    if target is not None:
        print(f"written: {result.write(target).name}")


if __name__ == "__main__":
    run(main)
