"""What a calibration has finished, kept on the disk: it can be killed at any moment.

    progress.json                  what the run is: settings, teacher, prompts
    samples.safetensors            the states, once they are drawn
    double_blocks.0.safetensors    a finished part's parameters
    double_blocks.0.json           its checksums and report, written after them

Each file is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import read_json
from convert.safetensors_read import SafetensorsReader
from convert.tensors import Spec, read_whole
from flux_jax.errors import UserError
from flux_jax.files import write_whole, writing
from ternary.calibration.states import Samples
from ternary.calibration.streaming import Part
from ternary.storage.latents import Checksums, Latents, write_part
from ternary.storage.tensor_file import TensorFile

_RUN = "progress.json"
_SAMPLES = "samples.safetensors"
_KEPT = "; what is finished is kept there"


@dataclasses.dataclass(frozen=True)
class PartReport:
    """What training did to a part.

    Attributes:
      before, after: mean loss over all samples: `|student - teacher|^2 / |teacher|^2` of the
        part's outputs, rounded but not trained, and after training.
      seconds: that the training took.
    """

    before: float
    after: float
    seconds: float


class Progress:
    """The folder of one run.

    Attributes:
      folder: where the files are.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        """Make the folder, or find what an earlier run left.

        Args:
          folder: of this run alone; `flux_jax.files.claimed` keeps others out.
          run: all that the result depends on, as JSON values.

        Raises:
          UserError: the folder is another run's, or cannot be written to.
        """
        self.folder = folder
        self._finished: dict[str, tuple[Checksums, PartReport]] = {}
        # As JSON has it: tuples are lists.
        wanted = json.loads(json.dumps(run))
        # Without states nothing is lost.
        if (folder / _SAMPLES).is_file():
            found = read_json(folder / _RUN)
            other = [k for k in sorted(wanted | found) if wanted.get(k) != found.get(k)]
            if other:
                raise UserError(
                    f"{folder}: belongs to another calibration, with {other[0]} "
                    f"{_show(found.get(other[0]))} where this one has "
                    f"{_show(wanted.get(other[0]))}; use the same settings to go on with it, or "
                    "remove it to start anew"
                )
            self._find()
            return
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._write_json(_RUN, wanted)

    def finished(self) -> set[str]:
        """Names of the parts that are done."""
        return set(self._finished)

    def report(self, part: str) -> PartReport:
        """The report of a finished part."""
        return self._finished[part][1]

    def checksums(self, part: str) -> Checksums:
        """The checksums of a finished part's tensors, by full name."""
        return self._finished[part][0]

    def path(self, part: str) -> Path:
        """Where a finished part's parameters are."""
        return self.folder / f"{part}.safetensors"

    def read(self, part: Part) -> dict[str, np.ndarray]:
        """A finished part's parameters, by their paths within it.

        Raises:
          UserError: they are damaged.
        """
        with Latents(self.folder, {part.name: self.checksums(part.name)}) as latents:
            return {name.removeprefix(part.prefix): latents[name] for name in latents}

    def write(self, part: Part, params: Mapping[str, Any], report: PartReport) -> None:
        """Keep a finished part.

        Raises:
          UserError: it cannot be written.
        """
        with self._replacing(self.path(part.name)) as waiting:
            checksums = write_part(waiting, {part.prefix + n: v for n, v in params.items()})
        content = {"crc32": checksums, **dataclasses.asdict(report)}
        self._write_json(f"{part.name}.json", content)
        self._finished[part.name] = checksums, report

    def read_samples(self) -> Samples | None:
        """The states of an earlier run, if it came so far."""
        path = self.folder / _SAMPLES
        if not path.is_file():
            return None
        stored = SafetensorsReader.open_file(path)
        try:
            values = {
                name: read_whole(stored, name) for name in Samples._fields if name != "prompt"
            }
            # Row numbers, far below the 2**24 that float32 counts exactly.
            prompt = read_whole(stored, "prompt").astype(np.int32)
            return Samples(**values, prompt=prompt)
        finally:
            stored.close()

    def write_samples(self, samples: Samples) -> None:
        """Keep the states.

        Raises:
          UserError: they cannot be written.
        """
        arrays = {n: v.astype(np.float32, copy=False) for n, v in samples._asdict().items()}
        stored = {name: Spec(v.shape, v.dtype) for name, v in arrays.items()}
        with self._replacing(self.folder / _SAMPLES) as waiting:
            with TensorFile(waiting, stored) as file:
                for name, values in arrays.items():
                    file.write(name, values)

    def _find(self) -> None:
        for path in self.folder.glob("*.json"):
            if path.name == _RUN:
                continue
            raw = read_json(path)
            try:
                report = PartReport(**{f.name: raw[f.name] for f in dataclasses.fields(PartReport)})
                self._finished[path.stem] = dict(raw["crc32"]), report
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: is malformed; remove {self.folder}") from error

    def _write_json(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self.folder / name, text.encode(), _KEPT)

    @contextlib.contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """Where to write a file: under its own name at the end of the block, or nowhere."""
        # One name for all times: what a killed process left is written over by the next.
        waiting = path.with_suffix(".partial")
        with self._writing():
            try:
                waiting.unlink(missing_ok=True)
                yield waiting
                waiting.rename(path)
            finally:
                # It has its whole size from the start, on a disk that may be full.
                waiting.unlink(missing_ok=True)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.folder, _KEPT)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
