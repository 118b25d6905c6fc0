"""The composition score of a model: draw every evaluation prompt, judge, and remember.

Each image is written as soon as it is drawn, with its record inside. A run that was stopped is
resumed by running it again: an image whose record is the one wanted is not drawn a second time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flux_jax.composition.prompts import CATEGORIES, EvalPrompt, load_prompts
from flux_jax.composition.score import Scores, score_images
from flux_jax.drawing import Job, draw
from flux_jax.errors import UserError
from flux_jax.files import write_whole
from flux_jax.metadata import GenerationRecord, read_picture
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompt_embeds import PromptEmbeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      scores: by category and overall, with the verdict on each image.
      prompts: what was drawn, in the order of the verdicts.
      records: how each image was drawn.
      drawn: images drawn by this run; the others were there already.
    """

    scores: Scores
    prompts: tuple[EvalPrompt, ...]
    records: tuple[GenerationRecord, ...]
    drawn: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: scores, settings that all images share, and a line for each image."""
        shared = dataclasses.asdict(self.records[0])
        # As JSON has it.
        shared["loras"] = list(shared["loras"])
        del shared["prompt"], shared["seed"]
        images = [
            {
                "file": file_name(index),
                "prompt": prompt.prompt,
                "category": prompt.category,
                "held_out": prompt.held_out,
                "seed": record.seed,
                "passed": verdict.passed,
                "exact": verdict.exact,
                "reasons": list(verdict.reasons),
            }
            for index, (prompt, record, verdict) in enumerate(
                zip(self.prompts, self.records, self.scores.verdicts, strict=True)
            )
        ]
        return {"scores": self.scores.to_dict(), "settings": shared, "images": images}


def file_name(index: int) -> str:
    """The image of the prompt at `index`."""
    return f"{index:04d}.png"


def select_prompts(limit: int | None) -> list[EvalPrompt]:
    """All evaluation prompts, or the first `limit` of each category.

    Raises:
      UserError: `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 prompt a category, got {limit}")
    prompts = load_prompts()
    return [
        prompt
        for category in CATEGORIES
        for prompt in [p for p in prompts if p.category == category][:limit]
    ]


def evaluate(
    pipe: FluxPipeline,
    out: Path,
    *,
    prompts: Sequence[EvalPrompt],
    embeds: PromptEmbeds,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float = 3.5,
    batch_size: int = 16,
    replace: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Draw `prompts` into a folder and score them; image i has seed `seed + i`.

    Args:
      pipe: the model.
      out: folder for the images and `report.json`; made if absent.
      prompts: from `select_prompts`.
      embeds: the same, encoded.
      seed, num_inference_steps, guidance_scale, batch_size: as in the pipeline's call.
      replace: draw again what another model or other settings drew there; else it is refused.
      progress: whether to show a progress bar on stderr.

    Raises:
      UserError: the folder cannot be made, an argument is out of range, or an image there is none
        of this run's and not to be replaced; one without a record never is.
    """
    jobs = [
        Job(prompt=prompt.prompt, seed=seed + index, file=file_name(index))
        for index, prompt in enumerate(prompts)
    ]
    rows = {prompt: row for row, prompt in enumerate(embeds.prompts)}
    drawn = draw(
        pipe,
        jobs,
        out,
        settings={
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "max_sequence_length": embeds.prompt_embeds.shape[1],
            "batch_size": batch_size,
        },
        encode=lambda texts: embeds.take([rows[text] for text in texts]),
        replace=replace,
        remedy="choose another folder, or replace what is in this one (--force)",
        # It would tell of pictures that are replaced one by one.
        reports=["report.json"],
        progress=progress,
    )
    images, records = _read_all(out, len(prompts))
    result = Evaluation(
        scores=score_images(images, prompts),
        prompts=tuple(prompts),
        records=records,
        drawn=drawn,
    )
    report = json.dumps(result.to_dict(), indent=1) + "\n"
    write_whole(out / "report.json", report.encode())
    return result


def _read_all(out: Path, count: int) -> tuple[list[np.ndarray], tuple[GenerationRecord, ...]]:
    """The pictures in a folder and their records.

    Raises:
      UserError: one is damaged inside, which only decoding it finds.
    """
    images, records = [], []
    for path in (out / file_name(index) for index in range(count)):
        try:
            image, record = read_picture(path)
        except UserError as error:
            raise UserError(f"{error}; remove it and give the command again") from error
        images.append(np.asarray(image.convert("RGB")))
        records.append(record)
    return images, tuple(records)
