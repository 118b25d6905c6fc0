"""Composition scores by category: those that the run took, or all three drawn anew."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.hub import local_path
from flux_jax import arguments, assets, loading
from flux_jax.errors import UserError
from flux_jax.files import write_whole
from ternary.config import QuantConfig
from ternary.distillation.run_config import RunConfig
from ternary.policy import Policy
from ternary.run_report.folder import Run
from ternary.storage.checkpoint import open_checkpoint

# Folders of an evaluation, in the order in which they are shown.
NAMES = {"teacher": "teacher", "student": "student", "rounded": "plain rounding"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One model's scores.

    Attributes:
      name: of the model.
      kind: "teacher", "student" or "rounded".
      scores: as `flux_jax.composition.score.Scores.to_dict` has them.
      images: a record of each picture; none if they were not kept.
      folder: of the pictures.
      model: what was scored, as it was named; nothing if that is not known.
    """

    name: str
    kind: str
    scores: Mapping[str, Any]
    images: Sequence[Any] = ()
    folder: Path = Path()
    model: str = ""

    @property
    def overall(self) -> float:
        """The mean of the categories' shares, in [0, 1]."""
        return float(self.scores["overall"]["passed"])

    @property
    def count(self) -> int:
        """Pictures that were judged."""
        return int(self.scores["overall"]["count"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What `--score` left: a column of each model, or fewer where it was stopped."""

    columns: tuple[Column, ...]

    @property
    def complete(self) -> bool:
        """Whether all three drew the same prompts."""
        prompts = [[entry["prompt"] for entry in column.images] for column in self.columns]
        return len(prompts) == len(NAMES) and all(each == prompts[0] for each in prompts)


def read_evaluations(run: Run) -> Evaluations:
    """What an earlier `--score` left in the run's folder; broken parts are left out."""
    columns = []
    for kind, name in NAMES.items():
        folder = run.folder / "evaluation" / kind
        try:
            report = json.loads((folder / "report.json").read_text("utf-8"))
            column = Column(
                name=name,
                kind=kind,
                scores=_checked(report["scores"]),
                images=[
                    {**entry, "prompt": str(entry["prompt"]), "seed": int(entry["seed"])}
                    for entry in report["images"]
                ],
                folder=folder,
                model=str(report.get("settings", {}).get("model") or ""),
            )
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
            continue
        columns.append(column)
    return Evaluations(columns=tuple(columns))


def of_others(evaluations: Evaluations, **named: str | Path | None) -> list[str]:
    """What an evaluation scored that is not what the report is asked to show, a line each.

    Args:
      evaluations: what `--score` left.
      **named: by kind of column, what the user named; None where they did not.

    A name that is no path here, of the hub or of another working folder, tells nothing.
    """
    lines = []
    for column in evaluations.columns:
        asked = named.get(column.kind)
        if asked is None or not column.model:
            continue
        one, other = local_path(column.model), local_path(asked)
        if one.exists() and other.exists() and not one.samefile(other):
            lines.append(
                f"evaluation/ has the scores of another {column.kind}, {column.model}: --score "
                "draws and judges anew."
            )
    return lines


def run_scores(run: Run) -> list[Column]:
    """What the run itself scored: teacher, student at its last drawing, and before training."""
    judged = []
    for sample in run.samples:
        try:
            if sample.step <= run.steps:
                found = sample.legend["scores"]
                both = {kind: _checked(found[kind]) for kind in ("teacher", "student")}
                judged.append((sample.step, both))
        except (AttributeError, KeyError, TypeError):
            continue
    if not judged:
        return []
    (first, begun), (last, ended) = judged[0], judged[-1]
    columns = [
        Column(name="teacher", kind="teacher", scores=ended["teacher"]),
        Column(name=f"student, step {last:,}", kind="student", scores=ended["student"]),
    ]
    if first == 0 and last > 0:
        start = run.settings.get("start")
        name = "calibrated, step 0" if start else "rounded, not trained (step 0)"
        columns.append(Column(name=name, kind="rounded", scores=begun["student"]))
    return columns


def _checked(scores: Any) -> Mapping[str, Any]:
    """Scores as they should be.

    Raises:
      AttributeError, KeyError, TypeError: they are not.
    """
    for share in (scores["overall"], *scores["categories"].values()):
        if not isinstance(share["passed"], float) or not isinstance(share["count"], int):
            raise TypeError("a share that is no number")
    return scores


def score(
    run: Run, student: Path, teacher: str, *, limit: int | None, progress: bool
) -> Evaluations:
    """Draw the composition prompts with teacher, student and plain rounding, and judge them.

    All start from the same noise. Plain rounding is the teacher with the student's layers rounded
    by the absolute mean. A call that was stopped goes on where it was.

    Args:
      run: whose folder takes the pictures, under `evaluation/`.
      student: a ternary pipeline.
      teacher: as for `FluxPipeline.from_pretrained`.
      limit: prompts of each category; None for all.
      progress: whether to show progress on stderr.

    Raises:
      UserError: a model that cannot be loaded, or a disk that is full.
    """
    from flux_jax.evaluate import evaluate, select_prompts
    from flux_jax.pipeline import FluxPipeline
    from flux_jax.prompts import TextEncoders

    prompts = select_prompts(limit)
    texts = [prompt.prompt for prompt in prompts]
    default = RunConfig()
    settings = {
        "num_inference_steps": run.settings.get("sampling_steps"),
        "guidance_scale": run.settings.get("guidance_scale", default.guidance_scale),
    }
    request = loading.check_request(
        teacher, {**settings, "prompt": texts}, images=len(texts), num_images_per_prompt=1
    )
    encoders = TextEncoders.from_pretrained(request.path)
    batch_size = arguments.integer(
        "sample_batch_size", run.settings.get("sample_batch_size", default.sample_batch_size)
    )
    embeds = encoders.encode(
        texts,
        max_sequence_length=request.plan.max_sequence_length,
        batch_size=min(len(texts), 32),
    )
    encoders.digests()
    encoders.free()
    out = run.folder / "evaluation"
    models = {
        "teacher": request.path,
        "student": student,
        "rounded": _rounded(request.path, student, out / "rounded_checkpoint"),
    }
    for kind, path in models.items():
        pipe = FluxPipeline.from_pretrained(path, dtype="bfloat16", text_encoders=encoders)
        evaluate(
            pipe,
            out / kind,
            prompts=prompts,
            embeds=embeds,
            batch_size=batch_size,
            progress=progress,
            **settings,
        )
    return read_evaluations(run)


def _rounded(teacher: Path, student: Path, folder: Path) -> Path:
    """The teacher with the student's layers rounded, made unless it is there already."""
    from ternary.storage.rounding import quantize_checkpoint

    with open_checkpoint(student) as checkpoint:
        quant, layers = checkpoint.description.quant, checkpoint.layers
    plain = QuantConfig(granularity=quant.granularity, activation_bits=quant.activation_bits)
    # Of which teacher's files, as they were.
    note = folder.with_name(f"{folder.name}.json")
    stamps = sorted(
        (str(file.relative_to(teacher)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in (teacher / "transformer").rglob("*")
    )
    made_of = json.dumps({"teacher": str(teacher.resolve()), "files": stamps})
    known = note.is_file() and note.read_text("utf-8") == made_of
    if known and (folder / "model_index.json").is_file():
        with open_checkpoint(folder) as checkpoint:
            if (checkpoint.description.quant, checkpoint.layers) == (plain, layers):
                return folder
    quantize_checkpoint(teacher, folder, plain, Policy(include=tuple(layers)), force=True)
    write_whole(note, made_of.encode())
    return folder


def find_student(run: Run, named: str | None) -> Path | None:
    """The student to look at: the one that is named, else the run's own, else none.

    Raises:
      UserError: a named one is not there.
    """
    if named is None:
        return run.student
    folder = local_path(assets.resolve(named))
    if not folder.is_dir():
        raise UserError(f"--student {named}: no such folder")
    return folder


def check_teacher(named: str | None) -> None:
    """Raises UserError where `named` is neither on this machine nor may be on the hub."""
    if named is not None and not local_path(named).exists() and not assets.is_name(named):
        raise UserError(
            f"--teacher {named}: no such folder, and neither a hub id (owner/name) nor a model "
            "that ships"
        )
