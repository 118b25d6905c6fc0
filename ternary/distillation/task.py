"""What a distillation run is about: teacher, prompts, start; and the folder that is its own.

All that can be refused is refused before the folder is made; its settings bind a run only once
there is a checkpoint to go on from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from convert.hub import local_path
from flux_jax import assets, loading
from flux_jax.composition.prompts import EvalPrompt, load_prompts
from flux_jax.errors import UserError
from flux_jax.files import partial_paths, write_whole, writing
from flux_jax.linears import linears
from flux_jax.prompt_file import read_prompts
from flux_jax.tree import Flat
from ternary.distillation.placement import abstract_student
from ternary.distillation.run_config import RunConfig, differences, load_yaml, to_yaml
from ternary.distillation.training_state import complete_steps
from ternary.layers import TernaryLinear
from ternary.storage.latents import Latents, load_latents

logger = logging.getLogger(__name__)

# In place of a file: the prompts that come with the package and have a composition score.
COMPOSITION = "composition"
# A folder within a run's.
CHECKPOINTS = "checkpoints"
# Of its settings: the teacher and the texts by what they are, wherever their files lie.
_TEACHER, _TEXTS = "teacher_crc32", "prompts_crc32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a run is about, beside its settings.

    Attributes:
      teacher: as for `FluxPipeline.from_pretrained`.
      prompts: file of the prompts to train on.
      start: folder of `python -m ternary calibrate`, whose latent weights are the start; None for
        the teacher's own.
      held_out: file of prompts to draw, or "composition" for those that come with a score; None
        to keep some of `prompts` from training.
    """

    teacher: str | Path
    prompts: str | Path
    start: str | Path | None = None
    held_out: str | Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The texts of a run.

    Attributes:
      train: to be trained on.
      held_out: to be drawn; none of them is in `train`.
      judged: the same with what they claim, or empty for prompts without a score.
    """

    train: list[str]
    held_out: list[str]
    judged: list[EvalPrompt]

    def fingerprint(self) -> str:
        """A short name for the texts: states name their prompts by row."""
        return f"{zlib.crc32(json.dumps([self.train, self.held_out]).encode()):08x}"


def split_prompts(task: Task, config: RunConfig) -> Prompts:
    """Training and held-out prompts; the two share none.

    Raises:
      UserError: a file that cannot be read, or nothing left to train on.
    """
    prompts = list(dict.fromkeys(read_prompts(local_path(task.prompts))))
    judged: list[EvalPrompt] = []
    if task.held_out == COMPOSITION:
        judged = load_prompts()
        held_out = [prompt.prompt for prompt in judged]
    elif task.held_out is not None:
        held_out = read_prompts(local_path(task.held_out))
    else:
        # Spread over the file, whose neighbours are often alike.
        count = min(config.held_out, len(prompts) - 1)
        # The default is no wish: it may be too many for a short file.
        if count < config.held_out != RunConfig().held_out:
            logger.warning(
                "held_out is %d, and %s has %d prompts: %d are held out",
                config.held_out,
                task.prompts,
                len(prompts),
                count,
            )
        rows = np.linspace(0, len(prompts) - 1, count).round().astype(int) if count else []
        held_out = [prompts[row] for row in rows]
    apart = set(held_out)
    train = [prompt for prompt in prompts if prompt not in apart]
    if not train:
        raise UserError(f"{task.prompts}: every prompt is held out, none is left to train on")
    return Prompts(train=train, held_out=held_out, judged=judged)


def check_task(task: Task, config: RunConfig, *, resumed: bool) -> loading.Request:
    """Refuse a run that could not begin, before anything is written, encoded or read whole.

    Args:
      task: teacher and start.
      config: settings.
      resumed: whether it goes on from a checkpoint, so that its start does not count any more.

    Returns:
      The drawing of one held-out prompt by the teacher.

    Raises:
      UserError: a teacher that is no whole pipeline or is ternary, a size or a policy that does not
        fit it, or a start that is not there or of another student.
    """
    request = loading.check_request(
        task.teacher,
        {
            "height": config.height,
            "width": config.width,
            "num_inference_steps": config.sampling_steps,
            "guidance_scale": config.guidance_scale,
            "max_sequence_length": config.max_sequence_length,
        },
        images=1,
        num_images_per_prompt=1,
    )
    teacher: Any = request.abstract["transformer"](jnp.dtype(config.distill.compute_dtype))
    if linears(teacher, TernaryLinear):
        raise UserError(
            f"the teacher {task.teacher} is ternary already; give the dense model it was made from"
        )
    abstract_student(teacher, config.quant, config.policy, config.distill)
    if task.start is not None and not resumed:
        open_start(local_path(task.start), config).close()
    return request


def open_folder(
    out: Path, task: Task, config: RunConfig, prompts: Prompts, teacher_crc32: int
) -> None:
    """Give a folder to a run, or see that it holds this very run, on whichever mesh.

    Before the first checkpoint the settings of an earlier call are replaced: nothing is lost.

    Args:
      out: the folder, claimed; made if absent.
      task, config: what the run is about, and its settings.
      prompts: those of the task; a run does not go on with others.
      teacher_crc32: of the teacher's weights, likewise.

    Raises:
      UserError: it was begun with other settings or by an earlier version, or cannot be written to.
    """
    settings = {name: None if v is None else str(v) for name, v in vars(task).items()}
    settings["teacher"] = _one_spelling(str(task.teacher))
    if task.start is not None:
        # Whether it is still there or not: the same command goes on without it.
        settings["start"] = str(local_path(task.start).resolve())
    settings[_TEACHER] = f"{teacher_crc32:08x}"
    # `held_out` is a setting too: how many to keep from training where no file is given.
    settings["held_out_prompts"] = settings.pop("held_out")
    settings[_TEXTS] = prompts.fingerprint()
    text = to_yaml(config, **settings)
    path = out / "run.yaml"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if path.exists() and complete_steps(out / CHECKPOINTS):
            changed = _changes(_stored_settings(path), yaml.safe_load(text))
            if changed:
                raise UserError(
                    f"{out} holds a run with other settings ({'; '.join(changed[:4])}): go on "
                    "with its own, or name another folder"
                )
            return
        # Killed while it wrote its settings for the first time, a run has left but a part of them.
        parts = partial_paths(path)
        if not path.exists() and set(out.iterdir()) - parts:
            raise UserError(f"{out} is not empty and holds no run: name another folder")
        for part in parts:
            part.unlink()
        write_whole(path, text.encode())


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps a run from going on with these settings."""
    # A run may go on on another mesh. Teacher and texts are compared by `_TEACHER` and `_TEXTS`.
    free = {"mesh", "teacher", "prompts", "held_out_prompts"}
    if now["start"] is None:
        # The start is behind it, and need not be kept.
        free.add("start")

    def kept(settings: dict[str, Any]) -> dict[str, Any]:
        start = _one_spelling(str(settings.get("start")))
        return {k: v for k, v in {**settings, "start": start}.items() if k not in free}

    return differences(kept(before), kept(now))


def _one_spelling(place: str) -> str:
    """The one spelling of a path that is there; a shipped model's or a hub's name as it is."""
    path = local_path(place)
    return str(path.resolve()) if assets.resolve(place) == place and path.exists() else place


def _stored_settings(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: restore it, or name another folder")
    for name in (_TEACHER, _TEXTS):
        if name not in content:
            raise UserError(
                f"{path} has no {name}: it was written by an earlier version, whose runs do not "
                "go on; name another folder"
            )
    return content


def open_start(folder: Path, config: RunConfig) -> Latents:
    """The latent weights of a calibration, opened; their shapes are not looked at yet.

    Raises:
      UserError: there are none, or they are of a student that these settings do not describe.
    """
    latents, quant, policy = load_latents(folder)
    found, wanted = (
        {"quant": dataclasses.asdict(q), "policy": dataclasses.asdict(p)}
        for q, p in ((quant, policy), (config.quant, config.policy))
    )
    if found != wanted:
        changed = "; ".join(differences(found, wanted))
        raise UserError(f"{folder} was calibrated for another student ({changed})")
    return latents


def calibrated_start(folder: Path, params: Flat, config: RunConfig) -> Flat:
    """The latent weights of a calibration, for the student that these settings describe.

    Args:
      folder: of the calibration.
      params: shapes of the student's parameters; their shardings say where each goes.
      config: of the run.

    Raises:
      UserError: they are of another student.
    """
    with open_start(folder, config) as latents:
        shapes = {name: tuple(value.shape) for name, value in params.items()}
        if {name: tuple(latents.spec(name).shape) for name in latents} != shapes:
            raise UserError(f"{folder} was calibrated for another transformer than the teacher's")
        arrays: Flat = {}
        for name, shape in params.items():
            host = latents[name]
            arrays[name] = jax.make_array_from_callback(
                host.shape, shape.sharding, lambda index, host=host: host[index]
            )
        return arrays
