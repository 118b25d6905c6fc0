"""Adapting a LoRA to a ternary student: from its file and prompts to a file of the student's own.

A run's folder holds `run.yaml` (the settings), the text embeddings, `metrics.csv` (a row for every
step), `checkpoints/` and, at the end, `lora.safetensors`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from tqdm import tqdm

from convert.hub import local_path
from convert.lora_write import write_lora
from flux_jax import loading
from flux_jax.errors import UserError
from flux_jax.files import claimed, make_folder, read_text, write_whole, writing
from flux_jax.lora import LoRA, LowRank, attach
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompt_file import read_prompts
from flux_jax.prompts import TextEncoders
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import Flat, split_flat
from ternary.config import AdaptConfig, TrajectoryConfig
from ternary.distillation.lora_step import LoRAStep, Models, split_factors
from ternary.distillation.metrics import Table, first_not_finite
from ternary.distillation.run_config import differences, load_yaml
from ternary.distillation.step import Metrics, PromptRows, TrainState
from ternary.distillation.text_cache import TextTable, cached_embeds
from ternary.distillation.training_state import PATIENCE, StateStore, complete_steps
from ternary.distillation.trajectory import Trajectories
from ternary.storage.source import weights_crc32

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_STATES = TrajectoryConfig()
_COLUMNS = ("step", "loss", "relative", "grad_norm", "learning_rate")
# Steps whose mean error is told: single ones differ by what states they have.
_FIRST, _LAST = 4, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptTask:
    """What is adapted to what.

    Attributes:
      teacher: as for `FluxPipeline.from_pretrained`: what the LoRA was made for.
      student: likewise: the ternary pipeline that shall have it.
      lora: the file, or a hub id; PATH:SCALE for a scale, which the result then contains.
      prompts: file of prompts to train on.
    """

    teacher: str | Path
    student: str | Path
    lora: str
    prompts: str | Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """How a run ended.

    Attributes:
      lora: the file, for the student.
      steps: that were taken, earlier processes included.
      first, last: squared error of the velocity over the square of that of the teacher with the
        LoRA, as the mean of the first steps, which have it almost as it was, and of the last.
    """

    lora: Path
    steps: int
    first: float
    last: float


def adapt_lora(
    task: AdaptTask, out: str | Path, config: AdaptConfig, *, progress: bool = True
) -> Adapted:
    """Train a LoRA's factors beside a student's weights; goes on where an earlier process ended.

    Args:
      task: teacher, student, LoRA and prompts.
      out: the run's folder.
      config: settings; must be those that the folder was begun with.
      progress: whether to show a progress bar on stderr.

    Raises:
      UserError: input that cannot be used, models of different configurations, another run in the
        folder, a loss that is not finite, or a disk that is full.
    """
    out = local_path(out)
    prompts = _some(list(dict.fromkeys(read_prompts(local_path(task.prompts)))), config)
    call: Any = {"images": 1, "num_images_per_prompt": 1}
    teacher = loading.check_request(task.teacher, {}, loras=[task.lora], **call)
    student = loading.check_request(task.student, {}, **call)
    if teacher.configs["transformer"] != student.configs["transformer"]:
        theirs, ours = (dataclasses.asdict(r.configs["transformer"]) for r in (teacher, student))
        changed = differences(theirs, ours)
        raise UserError(
            f"{task.student} is no student of {task.teacher}: their transformers differ "
            f"({'; '.join(changed[:3])})"
        )
    student = dataclasses.replace(student, loras=teacher.loras)
    make_folder(out)
    with claimed(out):
        settings = _settings(task, config, prompts, teacher, student)
        _open_folder(out, settings)
        return _Run(out, config, prompts, teacher, student, settings, progress).go()


def _some(prompts: list[str], config: AdaptConfig) -> list[str]:
    """As many of the prompts as there will be trajectories: encoding takes time and disk."""
    begun = config.steps * config.batch_size // min(_STATES.sampling_steps)
    needed = begun + _STATES.groups * config.batch_size
    if len(prompts) <= needed:
        return prompts
    return random.Random(config.seed).sample(prompts, needed)


def _settings(
    task: AdaptTask,
    config: AdaptConfig,
    prompts: Sequence[str],
    teacher: loading.Request,
    student: loading.Request,
) -> dict[str, Any]:
    """What a run must be begun and gone on with: contents in place of paths."""
    (lora,) = teacher.loras
    factors = 0
    for layer, change in sorted(lora.layers.items()):
        for array in (change.a, change.b * np.float32(lora.scale)):
            factors = zlib.crc32(f"{layer} {array.shape}".encode() + array.tobytes(), factors)
    bf16 = jnp.dtype(jnp.bfloat16)
    return {
        "teacher": str(task.teacher),
        "student": str(task.student),
        "lora": task.lora,
        "prompts": str(task.prompts),
        "teacher_crc32": f"{weights_crc32(teacher.path, bf16):08x}",
        "student_crc32": f"{weights_crc32(student.path, bf16):08x}",
        "lora_crc32": f"{factors:08x}",
        "prompts_crc32": f"{zlib.crc32(chr(10).join(prompts).encode()):08x}",
        **dataclasses.asdict(config),
    }


def _open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Give a folder to a run, or see that it holds this very run."""
    path = out / "run.yaml"
    if complete_steps(out / CHECKPOINTS):
        stored = load_yaml(read_text(path))
        if not isinstance(stored, dict):
            raise UserError(f"{path} is damaged: restore it, or name another folder")
        # Files may have moved; how often it is saved changes nothing.
        free = {"teacher", "student", "lora", "prompts", "checkpoint_every"}
        begun, asked = ({k: v for k, v in s.items() if k not in free} for s in (stored, settings))
        changed = differences(begun, asked)
        if changed:
            raise UserError(
                f"{out} holds a run with other settings ({'; '.join(changed[:4])}): go on with its "
                "own, or name another folder"
            )
        return
    if not path.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run: name another folder")
    with writing(path):
        write_whole(path, yaml.safe_dump(settings, sort_keys=False).encode())


class _Run:
    """A run in its folder, which is claimed."""

    def __init__(
        self,
        out: Path,
        config: AdaptConfig,
        prompts: list[str],
        teacher: loading.Request,
        student: loading.Request,
        settings: dict[str, Any],
        progress: bool,
    ):
        self.out, self.config, self.prompts, self.progress = out, config, prompts, progress
        self.teacher, self.student = teacher, student
        self.key = f"{settings['teacher_crc32']} {teacher.plan.max_sequence_length}"

    def go(self) -> Adapted:
        """Train, and write the LoRA."""
        with contextlib.ExitStack() as stack:
            store = StateStore(self.out / CHECKPOINTS, keep=1)
            stack.enter_context(_stopping(store))
            done = store.latest or 0
            with writing(self.out):
                rows = Table(self.out / "metrics.csv", _COLUMNS, done)
            stack.callback(rows.close)
            table = self._embeds()
            stack.callback(table.close)
            state = self._train(store, rows, table, done)
            store.wait()
        layers = _layers(state.params)
        target = self.out / "lora.safetensors"
        config = self.student.configs["transformer"]
        write_lora(target, LoRA(path=str(target), layers=layers), config, force=True)
        errors = [float(row["relative"]) for row in rows.read()]
        return Adapted(
            lora=target,
            steps=self.config.steps,
            first=float(np.mean(errors[:_FIRST])),
            last=float(np.mean(errors[-_LAST:])),
        )

    def _embeds(self) -> TextTable:
        plan, config = self.teacher.plan, self.teacher.configs["transformer"]
        encoders: list[TextEncoders] = []

        def encode(texts: Sequence[str]) -> PromptEmbeds:
            if not encoders:
                encoders.append(TextEncoders.from_pretrained(self.teacher.path))
            length = plan.max_sequence_length
            return encoders[0].encode(
                texts, max_sequence_length=length, batch_size=min(len(texts), 32)
            )

        shape = (plan.max_sequence_length, config.context_in_dim, config.vec_in_dim)
        return cached_embeds(self.out, self.prompts, encode, key=self.key, shape=shape)

    def _train(self, store: StateStore, rows: Table, table: TextTable, done: int) -> TrainState:
        config, plan = self.config, self.teacher.plan
        teacher, scheduler = _with_lora(self.teacher)
        student, _ = _with_lora(self.student)
        trajectories = Trajectories(
            _STATES,
            scheduler,
            tokens=plan.token_shape,
            batch_size=config.batch_size,
            prompts=len(self.prompts),
        )
        step = LoRAStep(teacher, student, config.training(), trajectories, grid=plan.grid)
        fixed, factors = split_factors(student)
        models = Models(split_flat(teacher)[1], fixed)

        def text(state: TrainState, group: int) -> PromptRows:
            txt, pooled = table.take(np.asarray(state.pool.prompt[group]))
            return PromptRows(jnp.asarray(txt), jnp.asarray(pooled))

        state = jax.jit(step.start)(factors, config.seed)
        groups = state.pool.x.shape[0]
        if done:
            state = store.restore(state)
            logger.info("going on from step %d of %d", done, config.steps)
        else:
            lead = jax.jit(step.lead, donate_argnums=0)
            for group in range(groups):
                rows_of = text(state, group)
                state = state._replace(pool=lead(state.pool, np.int32(group), models, rows_of))
        program = jax.jit(step, donate_argnums=0)
        bar = tqdm(
            total=config.steps,
            initial=done,
            desc="adapt",
            unit="step",
            disable=not self.progress,
            file=sys.stderr,
        )
        with bar:
            while done < config.steps:
                state, metrics = program(state, models, text(state, done % groups))
                done += 1
                self._look(done, metrics, rows, store)
                bar.set_postfix_str(f"error {float(metrics.relative):.4f}", refresh=False)
                bar.update()
                if done == config.steps or done % config.checkpoint_every == 0:
                    store.save(done, state)
        return state

    def _look(self, step: int, metrics: Metrics, rows: Table, store: StateStore) -> None:
        """Write a step's row; stop if it is not finite."""
        found = {"step": step, **{n: float(getattr(metrics, n)) for n in _COLUMNS[1:]}}
        if first_not_finite([found], ("loss", "grad_norm")) is not None:
            store.wait()
            raise UserError(
                f"the loss or gradient of step {step} is not finite; {store.describe_latest()}. "
                "Begin in another folder with a lower learning rate"
            )
        with writing(self.out):
            rows.add([found])


@contextlib.contextmanager
def _stopping(store: StateStore) -> Iterator[None]:
    """Close the store at the end; a run that was stopped says where it goes on."""
    try:
        yield
    except BaseException as error:
        signalled = not isinstance(error, Exception)
        store.close(PATIENCE if signalled else None)
        if signalled:
            logger.info("stopped; %s: give the command again to go on", store.describe_latest())
        raise
    store.close()


def _with_lora(request: loading.Request) -> tuple[FluxTransformer, Any]:
    """A checkpoint's transformer with the LoRA beside its weights, and the scheduler."""
    parts = loading.load_image_parts(request.path, dtype=jnp.bfloat16, mesh=None, given={})
    transformer: FluxTransformer = parts["transformer"]
    for lora in request.loras:
        attach(transformer, lora)
    return transformer, parts["scheduler"]


def _layers(factors: Flat) -> dict[str, LowRank]:
    """The factors by their linears' paths."""
    paths = sorted({name.rpartition(".")[0] for name in factors})
    return {
        path: LowRank(*(np.asarray(factors[f"{path}.lora_{part}"]) for part in ("a", "b")))
        for path in paths
    }
