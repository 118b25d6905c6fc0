"""A run's folder made by hand, as `ternary.distillation` leaves it, without training anything."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux_jax.composition.prompts import CATEGORIES
from ternary.distillation.held_out import gap, grid
from ternary.distillation.run_config import RunConfig, to_yaml

TEACHER_RGB, STUDENT_RGB = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
STEPS = 40
PROMPTS = ["a red circle", 'two <b>bold</b> squares & "quotes" \'', "a star left of a ring"]
SIDE = 32


def make_run(folder: Path, *, teacher: str = "elsewhere", scored: bool = True) -> Path:
    """40 steps, drawn at 0, 20 and 40: the teacher's pictures red, the student's blue."""
    folder.mkdir(parents=True)
    config = RunConfig(seed=7)
    text = to_yaml(config, teacher=teacher, prompts="prompts.txt", start=None)
    (folder / "run.yaml").write_text(text.replace("steps: 10000", f"steps: {STEPS}"))
    write_metrics(folder, [metrics_row(step) for step in range(1, STEPS + 1)])
    rows = []
    (folder / "samples").mkdir()
    for step in (0, 20, 40):
        score = step / 40
        rows.append((step, 10.0 + step / 4, 5.0 + step / 8, score if scored else "", 1.0))
        draw(folder, step, {"student": score, "teacher": 1.0} if scored else {})
    with (folder / "held_out.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "median_psnr_db", "low_psnr_db", "score", "teacher_score"))
        writer.writerows(rows)
    for step in (20, 40):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


def metrics_row(step: int, loss: float | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0 / step if loss is None else loss,
        "relative": 0.5 / step,
        "grad_norm": 2.0,
        "learning_rate": 1e-3 * (1 - step / STEPS),
    }


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(folder: Path, step: int, scores: dict[str, float]) -> None:
    """A grid and its legend, by the run's own function."""

    def plain(rgb: tuple[float, float, float]) -> np.ndarray:
        return np.broadcast_to(np.array(rgb, np.float32), (len(PROMPTS), SIDE, SIDE, 3)).copy()

    stem = folder / "samples" / f"step_{step:06d}"
    grid(plain(TEACHER_RGB), plain(STUDENT_RGB)).save(stem.with_suffix(".png"))
    legend = {
        "step": step,
        "height": SIDE,
        "width": SIDE,
        "gap": gap(SIDE),
        "shown": [
            {"prompt": prompt, "seed": index, "psnr_db": 10.0 + index + step}
            for index, prompt in enumerate(PROMPTS)
        ],
        "scores": {name: all_scores(value) for name, value in scores.items()},
    }
    stem.with_suffix(".json").write_text(json.dumps(legend))


def evaluate(folder: Path, **passed: float) -> None:
    """Scores of the three models by kind, as `--score` leaves them; their pictures are green."""
    for kind, share in passed.items():
        place = folder / "evaluation" / kind
        place.mkdir(parents=True)
        images = []
        for index, prompt in enumerate(PROMPTS):
            Image.new("RGB", (300, 200), (0, 255, 0)).save(place / f"{index}.png")
            images.append(
                {
                    "file": f"{index}.png",
                    "prompt": prompt,
                    "category": "colors",
                    "seed": index,
                    "passed": share > 0.5,
                    "reasons": [] if share > 0.5 else ["<i>none</i> seen"],
                }
            )
        content = {"scores": all_scores(share), "images": images}
        (place / "report.json").write_text(json.dumps(content))


def all_scores(passed: float) -> dict[str, Any]:
    share = {"passed": passed, "exact": passed, "count": 3}
    return {"overall": share, "categories": dict.fromkeys(CATEGORIES, share), "held_out": {}}
