"""Many images into one folder: in batches, by several processes, and on from where it was stopped.

An image appears under its name whole, with its record inside (`flux_jax.metadata`). So the folder
itself says what is done: a run that was killed at any moment is resumed by running it again, on any
number of devices and processes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flux_jax.errors import UserError
from flux_jax.files import claimed, clear_partials, make_folder, writing
from flux_jax.metadata import (
    GenerationRecord,
    check_png_path,
    is_cut_off_png,
    read_png,
    save_png,
)
from flux_jax.pipeline import FluxPipeline
from flux_jax.processes import Processes
from flux_jax.prompt_embeds import PromptEmbeds

# Prompts whose embeddings are in memory together; half a gigabyte for FLUX.1.
ENCODED_TOGETHER = 128

Encode = Callable[[Sequence[str]], PromptEmbeds]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One image.

    Attributes:
      prompt: what to draw.
      seed: of its noise.
      file: where to, a path inside the folder that ends in .png.
    """

    prompt: str
    seed: int
    file: str


def draw(
    pipe: FluxPipeline,
    jobs: Sequence[Job],
    out: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    encode: Encode | None = None,
    replace: bool = False,
    remedy: str = "choose another folder, or remove what is in this one",
    reports: Sequence[str] = (),
    progress: bool = True,
    processes: Processes | None = None,
) -> int:
    """Draw those of `jobs` that are not drawn yet.

    An image depends on its job and the settings alone, if a device draws one at a time; with more
    of them (`batch_size`), rounding depends on their number.

    Args:
      pipe: the model; in each process one of its own, on devices of its own.
      jobs: the images.
      out: their folder; made if absent. One run at a time draws into it.
      settings: keyword arguments of the pipeline's call that all images share.
      encode: prompts to embeddings, when they are needed; by default by the pipeline's encoders.
      replace: draw again what is there with other settings; by default it is refused. What has no
        record is none of ours, and refused anyway.
      remedy: what a refusal offers.
      reports: files of the folder that tell of its images: removed before one is drawn.
      progress: whether to show a progress bar on stderr, of all processes together.
      processes: among which the images are divided; by default this one draws all.

    Returns:
      How many images were drawn, by all processes.

    Raises:
      UserError: a setting out of its range, a folder that cannot be written to or that another run
        draws into, or an image there that is none of this run's.
      ValueError: two jobs of one file.
    """
    processes = Processes() if processes is None else processes
    files = collections.Counter(job.file for job in jobs)
    twice = [file for file, count in files.items() if count > 1]
    if twice:
        raise ValueError(f"jobs must have a file each, got {twice[0]!r} for several of them")
    wanted = _Wanted(pipe, settings or {})
    with contextlib.ExitStack() as stack:
        drawn = np.zeros(len(jobs), bool)
        if processes.first:
            make_folder(out)
            stack.enter_context(claimed(out))
            for folder in {out, *((out / job.file).parent for job in jobs)}:
                make_folder(folder)
                clear_partials(folder)
            checks = (wanted.is_drawn(out / job.file, job, replace, remedy) for job in jobs)
            drawn[:] = list(checks)
            if not drawn.all():
                with writing(out):
                    for name in reports:
                        (out / name).unlink(missing_ok=True)
        # One process looks: on a network's disk each might see something else.
        drawn = np.asarray(processes.from_first(drawn))
        if not out.is_dir():
            raise UserError(f"{out} must be on a disk that all processes share")
        missing = [job for job, done in zip(jobs, drawn, strict=True) if not done]
        shares = [missing[index :: processes.count] for index in range(processes.count)]
        shown = _Progress(shares, out, len(jobs), disable=not (progress and processes.first))
        # An error's line is none of the bar's.
        stack.callback(shown.close)
        for _ in wanted.draw(shares[processes.index], out, encode):
            shown.look()
        processes.wait("images")
        shown.look()
    return len(missing)


class _Wanted:
    """What is to be drawn, but for prompt and seed."""

    def __init__(self, pipe: FluxPipeline, settings: Mapping[str, Any]):
        self._pipe = pipe
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._negative = self._settings.pop("negative_prompt", None)
        self._plan = plan = pipe.plan(**self._settings)
        if not plan.takes_negative:
            self._negative = None
        self._shared = {
            "num_inference_steps": plan.schedule.num_steps,
            "height": plan.height,
            "width": plan.width,
            "max_sequence_length": plan.max_sequence_length,
            "guidance_scale": plan.guidance_scale,
            "negative_prompt": self._negative,
            "true_cfg_scale": 1.0 if self._negative is None else plan.true_cfg_scale,
            "dtype": str(pipe.transformer.dtype),
            "kernels": pipe.kernels,
            "attention": pipe.attention,
        }
        # Of LoRAs too, however their paths are spelled.
        self._fingerprint = pipe.fingerprint()

    def is_drawn(self, path: Path, job: Job, replace: bool, remedy: str) -> bool:
        """Whether the file is the image; a file that is cut off is not.

        Raises:
          UserError: it is another image, and not to be replaced, or none of ours.
        """
        check_png_path(path)
        if not path.is_file():
            return False
        expected = {
            "prompt": job.prompt,
            "seed": job.seed,
            **self._shared,
            "fingerprint": self._fingerprint,
        }
        try:
            record = read_png(path, pixels=False)
        except UserError:
            if is_cut_off_png(path):
                return False
            raise
        differs = [name for name, value in expected.items() if getattr(record, name) != value]
        if differs and not replace:
            name = differs[0]
            raise UserError(
                f"{path} is there with {name} {getattr(record, name)!r}, where {expected[name]!r} "
                f"is asked for: {remedy}"
            )
        return not differs

    def draw(self, jobs: Sequence[Job], out: Path, encode: Encode | None) -> Iterator[None]:
        """Draw and write, batch by batch."""
        encode = self._encode if encode is None else encode
        negative = encode([self._negative]) if jobs and self._negative is not None else None
        size = self._plan.batch_size
        chunk = math.ceil(ENCODED_TOGETHER / size) * size
        saving: list[Future[None]] = []
        # An image is compressed while the next ones are drawn.
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(jobs), chunk):
                encoded = jobs[start : start + chunk]
                embeds = encode([job.prompt for job in encoded])
                for first in range(0, len(encoded), size):
                    rows = range(first, min(first + size, len(encoded)))
                    output = self._pipe(
                        embeds.take(rows),
                        negative_prompt=negative,
                        seed=[encoded[row].seed for row in rows],
                        progress=False,
                        **self._settings,
                    )
                    _finish(saving)
                    saving = [
                        pool.submit(save_png, image, out / encoded[row].file, self._record(record))
                        for row, image, record in zip(
                            rows, output.images, output.records, strict=True
                        )
                    ]
                    yield
            _finish(saving)

    def _encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        length = self._plan.max_sequence_length
        return self._pipe.encode_prompt(prompts, max_sequence_length=length)

    def _record(self, record: GenerationRecord) -> GenerationRecord:
        return dataclasses.replace(record, fingerprint=self._fingerprint)


def _finish(saving: list[Future[None]]) -> None:
    for future in saving:
        future.result()


class _Progress:
    """A bar of the images that are there, whoever drew them."""

    def __init__(self, shares: Sequence[Sequence[Job]], out: Path, total: int, *, disable: bool):
        """The missing images, as the processes share them, of `total` in all."""
        missing = sum(map(len, shares))
        self._bar = tqdm(total=total, initial=total - missing, disable=disable, unit="image")
        # What each process has still to draw, the next one last. An image that is to be replaced
        # counts once it is another file.
        self._waiting: list[list[tuple[Path, int | None]]] = []
        if not disable:
            paths = [[out / job.file for job in reversed(share)] for share in shares]
            self._waiting = [[(path, _stamp(path)) for path in share] for share in paths]

    def look(self) -> None:
        """Count what has come: each process draws in order, so only its next ones are looked at."""
        for share in self._waiting:
            while share and _stamp(share[-1][0]) != share[-1][1]:
                share.pop()
                self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
