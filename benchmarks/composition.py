"""Composition score of the shipped model, beside what the detector says of the truth.

    python -m benchmarks.composition --images evaluation

Draws every held-out prompt (a quarter of an hour on two CPU cores; a stopped run is resumed), and
scores the drawings of the same prompts' own scenes, for their prompts and for shuffled ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import typer

from benchmarks.common import Figure, OutOrNone, Peer, Result, results_folder, run
from benchmarks.machine import package_versions
from flux_jax.composition.score import Scores, check_detector
from flux_jax.evaluate import evaluate, select_prompts
from flux_jax.pipeline import FluxPipeline

# Of the published scores.
GUIDANCE = 3.5


def figures(scores: Scores) -> dict[str, Figure]:
    """The shares as figures: overall, by category, and by what is new about the prompt."""
    shares = {"overall": scores.overall, **scores.categories}
    shares |= {f"held_out/{name}": share for name, share in scores.held_out.items() if share.count}
    return {
        name: Figure(value=share.passed, unit="share", note=f"of {share.count} pictures")
        for name, share in shares.items()
    }


def main(
    images: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("evaluation"),
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = GUIDANCE,
    out: OutOrNone = None,
) -> None:
    """Score the shipped model in GenEval's six categories, and write the result file."""
    target = results_folder(out, {"--guidance": guidance != GUIDANCE})
    pipe = FluxPipeline.from_pretrained("tiny")
    prompts = select_prompts(None)
    embeds = pipe.encode_prompt([prompt.prompt for prompt in prompts])
    found = evaluate(pipe, images, prompts=prompts, embeds=embeds, guidance_scale=guidance)
    versions = package_versions("jax", "flax", "numpy")
    truth, shuffled = check_detector()
    result = Result(
        benchmark="composition",
        device=jax.devices()[0].device_kind,
        figures=figures(found.scores),
        peers={
            "drawings of the prompts": Peer(versions=versions, figures=figures(truth)),
            "the same, prompts shuffled": Peer(versions=versions, figures=figures(shuffled)),
        },
    )
    for name, figure in result.figures.items():
        print(f"  {name:32} {figure.value:8.4f} {figure.note}")
    if target is not None:
        print(f"written: {result.write(target).name}")


if __name__ == "__main__":
    run(main)
