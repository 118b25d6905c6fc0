"""What the commands share: options, set-up, and the loading of a pipeline in stages."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flux_jax.assets import DEFAULT_MODEL
from flux_jax.errors import UserError
from pallas_kernels.command_line import Force as Force
from pallas_kernels.command_line import Json as Json
from pallas_kernels.command_line import Quiet as Quiet
from pallas_kernels.command_line import check_folder_of as check_folder_of
from pallas_kernels.command_line import print_json as print_json

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flux_jax.pipeline import FluxPipeline
    from flux_jax.plan import Plan
    from flux_jax.prompt_embeds import PromptEmbeds

logger = logging.getLogger(__name__)

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="tiny-ternary or its teacher tiny (both ship with the package), a folder (converted, "
        "or as on Hugging Face) or a Hugging Face repository id.",
        show_default=DEFAULT_MODEL,
    ),
]
DType = Annotated[str, typer.Option(help="bf16 or fp32: the weights' type and the computation's.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="28; schnell: 4")]
Guidance = Annotated[float, typer.Option(help="Guidance scale (not schnell).")]
Side = Annotated[
    int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="the model's own")
]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens of the prompt that T5 reads.", show_default="the model's own"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Images drawn together, over all devices; above one a device, a seed's image is the "
        "same to rounding only.",
        show_default="one a device",
    ),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="How this process's devices are laid out, as data=4 (images over devices) or "
        "data=2,sequence=2 (each image over two); tensor splits the weights. An axis left out "
        "is 1.",
        show_default="one device",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub id; a commit never changes."),
]
LoRAs = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[:SCALE]",
        help="A LoRA's safetensors file or hub id, beside the transformer's weights, packed ones "
        "too. May be given several times.",
        show_default="none",
    ),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Join the other processes of this job: SLURM's, Open MPI's, or those named by "
        "COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID.",
    ),
]


def dtype_name(text: str) -> str:
    """JAX's name of a dtype as people write it.

    Raises:
      UserError: not one of `DTYPES`.
    """
    if text not in DTYPES:
        raise UserError(f"--dtype must be bf16 or fp32, got {text}")
    return DTYPES[text]


def mesh_of_this_process(text: str | None) -> Mesh | None:
    """The mesh that --mesh asks for, of this process's devices; None without it.

    An axis that is not named has one device, `data` too: one image would else be drawn by all.

    Raises:
      UserError: it cannot be read, or there are fewer devices.
    """
    if text is None:
        return None
    import jax

    from flux_jax.sharding import read_mesh

    asked = read_mesh(text)
    if asked.data is None:
        asked = dataclasses.replace(asked, data=1)
    return asked.make(jax.local_devices())


def check_png_target(path: Path) -> None:
    """Refuse, before anything is computed, a PNG that could not be written in the end.

    Raises:
      UserError: the path does not end in .png, is a folder, or its folder cannot be written to.
    """
    from flux_jax.metadata import check_png_path

    check_png_path(path)
    check_folder_of("--out", path)


@contextlib.contextmanager
def naming_options() -> Iterator[None]:
    """What the pipeline says of its arguments, said of the options that they were given by."""
    try:
        yield
    except UserError as error:
        argument, _, rest = str(error).partition(" ")
        if argument not in _OPTION_OF:
            raise
        raise UserError(f"{_OPTION_OF[argument]} {rest}") from error


# Of arguments that have another name in Python, or the same without the dashes.
_OPTION_OF = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "negative_prompt": "--negative",
    "num_images_per_prompt": "--num-images",
    "num_images": "--num-images",
    "max_sequence_length": "--max-sequence-length",
    "batch_size": "--batch-size",
    "height": "--height",
    "width": "--width",
    "seed": "--seed",
    "limit": "--limit",
    "text_encoders": "--text-encoders",
    "dtype": "--dtype",
    "to": "--to",
    "prompt": "PROMPT",
}


def bounded_batch(batch_size: int, images: int, mesh: Mesh | None) -> int:
    """A batch of no more than there are images: the rest of it would be filled up, and drawn."""
    from flux_jax.sharding import axis_size

    parts = 1 if mesh is None else axis_size(mesh, "data")
    return min(batch_size, max(1, math.ceil(images / parts)) * parts)


def negative_prompt(settings: Mapping[str, Any], plan: Plan, *, quiet: bool = False) -> str | None:
    """The negative prompt if it has an effect; unless `quiet`, a warning of what has none.

    Raises:
      UserError: it is no text.
    """
    from flux_jax import arguments

    negative = settings.get("negative_prompt")
    if negative is None:
        if plan.takes_negative and not quiet:
            logger.warning("--true-cfg has no effect without --negative")
        return None
    arguments.texts("negative_prompt", negative)
    if plan.takes_negative:
        return negative
    if not quiet:
        logger.warning("--negative has no effect without --true-cfg above 1")
    return None


class Stopwatch:
    """Seconds of named stages, in the order in which they were entered."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; what goes by the same name is added up."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadyPipeline:
    """A pipeline and the prompts it is to draw.

    Attributes:
      pipe: the pipeline, its text encoders used and freed.
      prompts, negative: encoded; `negative` is None without a negative prompt.
      fingerprint: of the model; None if not wanted.
    """

    pipe: FluxPipeline
    prompts: PromptEmbeds
    negative: PromptEmbeds | None
    fingerprint: str | None


def load_and_encode(
    model: str | None,
    settings: Mapping[str, Any],
    *,
    dtype: str,
    num_images: int = 1,
    with_fingerprint: bool = True,
    mesh: Mesh | None = None,
    offload_modulation: bool = False,
    loras: Sequence[str] = (),
    revision: str | None = None,
) -> ReadyPipeline:
    """Check what is asked for, then encode the prompts while the rest of the model is loaded.

    T5 passes through the device two blocks at a time, so that it needs no room beside the
    transformer; both encoders are gone at the end. Meanwhile the programs of the call are traced.
    Nothing is loaded if an argument is wrong.

    Args:
      model: as in `Model`.
      settings: keyword arguments of the pipeline's call, prompts included.
      dtype: "bfloat16" or "float32".
      num_images: of each prompt.
      with_fingerprint: whether it is wanted.
      mesh: devices to draw on; by default one.
      offload_modulation: as in `FluxPipeline`.
      loras: as in `LoRAs`.
      revision: as in `Revision`.
    """
    from flux_jax import arguments, loading
    from flux_jax.pipeline import FluxPipeline
    from flux_jax.prompts import TextEncoders
    from flux_jax.residence import STREAMED

    prompts = arguments.texts("prompt", settings["prompt"])
    request = loading.check_request(
        model,
        settings,
        images=len(prompts),
        num_images_per_prompt=num_images,
        mesh=mesh,
        loras=loras,
        revision=revision,
    )
    path, length = request.path, request.plan.max_sequence_length
    negative = negative_prompt(settings, request.plan)
    batch_size = request.plan.device_batch_size

    def encode(texts: list[str]) -> PromptEmbeds:
        return encoders.encode(
            texts,
            max_sequence_length=length,
            batch_size=batch_size,
            for_digests=with_fingerprint,
        )

    # Reading and copying leave the interpreter to tracing.
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(loading.load_image_parts, path, dtype=dtype, mesh=mesh, given={})
        programs = pool.submit(loading.lower_ahead, request, dtype, mesh)
        encoders = TextEncoders.from_pretrained(path, dtype=dtype, mesh=mesh, placement=STREAMED)
        # All at once: T5's weights are read once.
        embeds = encode(prompts if negative is None else [*prompts, negative])
        if with_fingerprint:
            encoders.digests()
        encoders.free()
        for program in programs.result():
            program.compile()
        pipe = FluxPipeline(
            text_encoders=encoders,
            offload_modulation=offload_modulation,
            name=request.name,
            **others.result(),
        )
        for lora in request.loras:
            pipe.add_lora(lora)
    return ReadyPipeline(
        pipe=pipe,
        prompts=embeds.take(range(len(prompts))),
        negative=None if negative is None else embeds.take([len(prompts)]),
        fingerprint=pipe.fingerprint() if with_fingerprint else None,
    )


def peak_device_bytes() -> int | None:
    """The most memory in use on the default device since the process started, if it is told."""
    from pallas_kernels.backends import default_device

    stats = default_device().memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def numbered(path: Path, count: int) -> list[Path]:
    """`count` paths: the path itself, or `image-0.png`, `image-1.png` ... beside it."""
    if count == 1:
        return [path]
    digits = len(str(count - 1))
    return [path.with_name(f"{path.stem}-{i:0{digits}d}{path.suffix}") for i in range(count)]
