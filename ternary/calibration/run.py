"""From a checkpoint and prompts to a calibrated ternary checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import hub
from convert.replaceable import check_apart, check_target, staged_folder
from convert.tables import LATENTS
from convert.tensors import BFLOAT16
from flux_jax import arguments
from flux_jax.checkpoint import inspect_checkpoint
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.files import claimed, writing
from flux_jax.latents import PATCH, check_size
from flux_jax.plan import sequence_length
from flux_jax.prompt_embeds import PromptEmbeds
from flux_jax.prompts import TextEncoders
from flux_jax.tokenization import stored_max_length
from ternary.calibration.calibrator import Calibrator, Listener
from ternary.calibration.plan import check_prompts, make_plan
from ternary.calibration.progress import PartReport, Progress
from ternary.calibration.states import trajectories
from ternary.calibration.streaming import HostWeights, Part
from ternary.config import CalibrateConfig, QuantConfig
from ternary.distillation.step import PromptSet
from ternary.policy import Coverage, Policy, coverage
from ternary.storage.latents import Checksums, write_index, write_part
from ternary.storage.saving import stored_layer, write_transformer
from ternary.storage.source import open_dense_pipeline, weights_crc32


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """What a calibration made.

    Attributes:
      reports: of each trained part, by name.
      coverage: how much of the transformer is ternary.
    """

    reports: dict[str, PartReport]
    coverage: Coverage


def choose_prompts(prompts: Sequence[str], config: CalibrateConfig) -> list[str]:
    """As many of the prompts as there are trajectories, at random: others would not be used."""
    count = min(trajectories(config), len(prompts))
    rows = np.random.default_rng([config.seed, 2]).permutation(len(prompts))[:count]
    return [prompts[int(row)] for row in sorted(rows)]


def check_teacher(
    src: str | Path, dst: Path, quant: QuantConfig, policy: Policy, config: CalibrateConfig
) -> None:
    """Refuse a teacher that these settings do not fit, before its prompts are encoded.

    Raises:
      UserError: it has no transformer, or a ternary one, or would be replaced by `dst`; a pattern
        that matches nothing, a rank beyond a weight, or blocks that are not there.
    """
    with open_dense_pipeline(src) as pipeline:
        check_apart(pipeline.path, dst)
        make_plan(pipeline.config, pipeline.shapes, policy, config, rank=quant.rank)


def encode_prompts(
    src: str | Path,
    prompts: Sequence[str],
    *,
    max_sequence_length: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PromptSet:
    """Prompts through a checkpoint's own text encoders, which are on the device meanwhile.

    Args:
      src: the checkpoint.
      prompts: the texts.
      max_sequence_length: tokens of T5; the model's own length by default.
      on_progress: told how many prompts are encoded, of how many.

    Returns:
      On the host, bfloat16.

    Raises:
      UserError: the checkpoint lacks the transformer, an encoder or a tokenizer.
    """
    found = inspect_checkpoint(src)
    if "transformer" not in found.components:
        raise UserError(f"{src} has no transformer, whose prompts these would be")
    config: Any = found.components["transformer"].config
    if "tokenizer_2" not in found.tokenizer_paths:
        raise UserError(f"{src} has no tokenizer_2, which prompts need")
    limit = stored_max_length(found.tokenizer_paths["tokenizer_2"])
    length = sequence_length(config, limit, max_sequence_length)
    encoders = TextEncoders.from_pretrained(src, dtype=jnp.bfloat16)
    # A batch at a time to the host: thousands of prompts would not fit the device.
    parts = []
    for start in range(0, len(prompts), 8):
        embeds = encoders.encode(prompts[start : start + 8], max_sequence_length=length)
        parts.append((np.asarray(embeds.prompt_embeds), np.asarray(embeds.pooled_prompt_embeds)))
        on_progress(min(start + 8, len(prompts)), len(prompts))
    encoders.free()
    joined: Any = [np.concatenate([part[i] for part in parts]) for i in (0, 1)]
    return PromptSet(*joined)


def image_grid(
    src: str | Path, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Image tokens (rows, columns) for a size in pixels; the model's own size by default.

    Raises:
      UserError: a size that is not a whole number of tokens, or a checkpoint without autoencoder.
    """
    components = inspect_checkpoint(src).components
    if "vae" not in components:
        raise UserError(f"{src} has no vae, which says how large its images are; give the grid")
    vae: Any = components["vae"].config
    side = vae.downscale * PATCH
    rows, columns = (vae.sample_size if x is None else x for x in (height, width))
    check_size(rows, columns, side)
    return rows // side, columns // side


def calibrate_checkpoint(
    src: str | Path,
    dst: str | Path,
    prompts: str | Sequence[str] | PromptEmbeds | PromptSet,
    quant: QuantConfig,
    policy: Policy,
    config: CalibrateConfig,
    *,
    grid: tuple[int, int] | None = None,
    latents: bool = True,
    force: bool = False,
    listener: Listener | None = None,
    prompts_name: str | None = None,
) -> CalibrationResult:
    """Calibrate a checkpoint's transformer; write a ternary pipeline, and its latent weights.

    What is finished lies in `DST.calibration`, beside the target, until the target is whole; the
    same call goes on from there. On the host: the teacher's weights, the prompts and two streams
    for each sample. On the device: two parts of the teacher and one in training.

    Args:
      src: the teacher: any layout that `FluxPipeline.from_pretrained` reads.
      dst: folder to be made; it appears complete or not at all.
      prompts: texts, which the teacher's own encoders encode, as many as there are trajectories;
        or encoded, by `FluxPipeline.encode_prompt` or `encode_prompts`.
      quant, policy, config: what is ternary, and how it is trained.
      grid: image tokens (rows, columns); by default those of the model's own size.
      latents: also write `DST/latents`, from which `distill` starts.
      force: replace an existing checkpoint, once the new one is whole.
      listener: told how far it is.
      prompts_name: what tells these prompts from others, by which a stopped call is known again; by
        default a digest of the texts, or of what they were encoded to, which another machine may
        round otherwise.

    Raises:
      UserError: anything wrong with the source, the target, the prompts or the training.
    """
    dst = hub.local_path(dst)
    check_target(dst, force=force)
    grid = image_grid(src) if grid is None else read_grid(grid)
    listener = listener or Listener()
    if isinstance(prompts, PromptEmbeds):
        prompts = PromptSet(prompts.prompt_embeds, prompts.pooled_prompt_embeds)
    elif not isinstance(prompts, PromptSet):
        texts = choose_prompts(arguments.texts("prompts", prompts), config)
        prompts_name = prompts_name or texts_fingerprint(texts, None)
        check_teacher(src, dst, quant, policy, config)
        prompts = encode_prompts(src, texts)
    folder = Path(f"{os.path.abspath(dst)}.calibration")
    with open_dense_pipeline(src) as pipeline:
        # What can be refused is, before 24 GB are read.
        check_apart(pipeline.path, dst)
        make_plan(pipeline.config, pipeline.shapes, policy, config, rank=quant.rank)
        check_prompts(pipeline.config, prompts)
        dtype = jnp.dtype(config.compute_dtype)
        weights = HostWeights.read(pipeline, dtype, listener.on_weights)
        scheduler = pipeline.scheduler or SchedulerConfig.dev()
        run = {
            # Of all components: where prompts go by a name, it says nothing of their encoders.
            "teacher_crc32": f"{weights_crc32(src, dtype):08x}",
            "prompts": prompts_name or prompts_fingerprint(prompts),
            "grid": grid,
            "scheduler": dataclasses.asdict(scheduler),
            **dataclasses.asdict(quant),
            **dataclasses.asdict(policy),
            **dataclasses.asdict(config),
        }
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder):
            progress = Progress(folder, run)
            calibrator = Calibrator(
                weights, scheduler, prompts, grid, quant, policy, config, progress
            )
            reports = calibrator.run(listener)
            names = [
                part.prefix + layer
                for part in weights.parts
                for layer in calibrator.plan.layers[part.name]
            ]
            with staged_folder(dst, force=force) as stage:
                pipeline.write_rest(stage)
                target = stage / LATENTS if latents else None
                tensors = _write_parts(calibrator, quant, policy, target)
                write_transformer(stage / "transformer", weights.config, quant, names, tensors, {})
            shutil.rmtree(folder, ignore_errors=True)
    return CalibrationResult(reports=reports, coverage=coverage(weights.shapes(), names))


def read_grid(grid: Any) -> tuple[int, int]:
    """Image tokens as a caller gives them, checked.

    Raises:
      UserError: not two whole numbers of at least 1.
    """
    if not isinstance(grid, list | tuple) or len(grid) != 2:
        raise UserError(f"grid must be (rows, columns) of image tokens, got {grid!r:.60}")
    rows, columns = (arguments.integer("a side of the grid", side) for side in grid)
    return rows, columns


def _write_parts(
    calibrator: Calibrator, quant: QuantConfig, policy: Policy, latents: Path | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the ternary transformer; on the way, each part's latent weights."""
    if latents is not None:
        latents.mkdir()
    checksums: dict[str, Checksums] = {}
    for part in calibrator.weights.parts:
        params = calibrator.student(part)
        if latents is not None:
            checksums[part.name] = _write_latents(calibrator, part, params, latents)
        layers = calibrator.plan.layers[part.name]
        for layer in layers:
            yield from stored_layer(part.prefix + layer, calibrator.programs.layer(params, layer))
        for name, value in params.items():
            if name.rpartition(".")[0] not in layers:
                yield part.prefix + name, np.asarray(value).astype(BFLOAT16)
    if latents is not None:
        write_index(latents, checksums, quant, policy)


def _write_latents(calibrator: Calibrator, part: Part, params: Any, folder: Path) -> Checksums:
    """A trained part's file is there already; of another, the latent weights are the teacher's."""
    path, progress = folder / f"{part.name}.safetensors", calibrator.progress
    if part.name not in progress.finished():
        return write_part(path, {part.prefix + n: v for n, v in params.items()})
    try:
        os.link(progress.path(part.name), path)
    except OSError:
        # A disk without hard links.
        shutil.copyfile(progress.path(part.name), path)
    return progress.checksums(part.name)


def texts_fingerprint(texts: Sequence[str], max_sequence_length: int | None) -> str:
    """A short name for prompts that are encoded anew by each call."""
    return f"{zlib.crc32(repr((list(texts), max_sequence_length)).encode()):08x}"


def prompts_fingerprint(prompts: PromptSet) -> str:
    """A short name for encoded prompts."""
    crc = zlib.crc32(str([(x.shape, str(x.dtype)) for x in prompts]).encode())
    for values in prompts:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        crc = zlib.crc32(data, crc)
    return f"{crc:08x}"
