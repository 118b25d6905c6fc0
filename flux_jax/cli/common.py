"""What the commands share: options, set-up, and the loading of a pipeline in stages."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_jax.errors import UserError, exit_on_user_error

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="tiny (ships with the package), a folder (converted, or as on Hugging Face) or a "
        "Hugging Face repository id.",
        show_default="tiny",
    ),
]
DType = Annotated[str, typer.Option(help="bf16 or fp32: the weights' type and the computation's.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no messages.")]


def dtype_name(text: str) -> str:
    """JAX's name of a dtype as people write it.

    Raises:
      UserError: not one of `DTYPES`.
    """
    if text not in DTYPES:
        raise UserError(f"--dtype must be bf16 or fp32, got {text}")
    return DTYPES[text]


@contextlib.contextmanager
def command(*, quiet: bool) -> Iterator[None]:
    """Around every command: one line for what the user can mend, and the compilation cache."""
    logging.basicConfig(format="%(levelname)s: %(message)s".lower(), stream=sys.stderr)
    logging.getLogger("flux_jax").setLevel(logging.ERROR if quiet else logging.INFO)
    with exit_on_user_error():
        from flux_jax.compile_cache import enable_compilation_cache

        enable_compilation_cache()
        yield


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(content, indent=2))


class Stopwatch:
    """Seconds of named stages, in the order in which they were entered."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 3)


def load_and_encode(
    model: str,
    prompts: str | Sequence[str],
    negative: str | None,
    *,
    dtype: str,
    max_sequence_length: int | None,
    with_fingerprint: bool,
    batch_size: int = 1,
) -> tuple[Any, Any, Any]:
    """A pipeline and the prompts it is to draw, never with all of the model on the device.

    The text encoders are loaded, used and freed before the transformer is loaded: the peak is the
    larger of the two, not their sum.

    Args:
      model: as in `Model`.
      prompts, negative: to encode; `negative` may be None.
      dtype: "bfloat16" or "float32".
      max_sequence_length: T5 tokens; None for the model's own.
      with_fingerprint: whether the pipeline will be asked for it.
      batch_size: prompts encoded at a time.

    Returns:
      (pipeline, encoded prompts, encoded negative prompt or None).
    """
    from flux_jax import arguments
    from flux_jax.pipeline import FluxPipeline
    from flux_jax.prompts import TextEncoders

    encoders = TextEncoders.from_pretrained(model, dtype=dtype)
    wanted = arguments.texts("prompt", prompts), negative and [negative]
    embeds, negative_embeds = (
        encoders.encode(each, max_sequence_length=max_sequence_length, batch_size=batch_size)
        if each
        else None
        for each in wanted
    )
    if with_fingerprint:
        encoders.digests()
    encoders.free()
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, text_encoders=encoders)
    return pipe, embeds, negative_embeds


def peak_device_bytes() -> int | None:
    """The most memory in use on the first device since the process started; None if not told."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def numbered(path: Path, count: int) -> list[Path]:
    """`count` paths: the path itself, or `image-0.png`, `image-1.png` ... beside it."""
    if count == 1:
        return [path]
    digits = len(str(count - 1))
    return [path.with_name(f"{path.stem}-{i:0{digits}d}{path.suffix}") for i in range(count)]
