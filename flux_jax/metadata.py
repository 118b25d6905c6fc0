"""How an image was drawn, kept inside its PNG file, so that it can be drawn again.

Two iTXt chunks: `flux_jax`, a JSON object with the fields of `GenerationRecord`, and `parameters`,
the same for people, in the form that image browsers for other generators already show.
"""

from __future__ import annotations

import dataclasses
import io
import json
import typing
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from flux_jax.errors import UserError
from flux_jax.files import write_whole
from flux_jax.json_values import fits, kind_name, parse_json

FORMAT_VERSION = 1
_CHUNK, _READABLE_CHUNK = "flux_jax", "parameters"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """Everything that determined one image.

    Attributes:
      prompt: what was asked for.
      seed: of this image; None if it came from a key or from given latents, which makes it
        impossible to draw again from this record alone.
      num_inference_steps, height, width, max_sequence_length: as in the pipeline's call.
      guidance_scale: None for a model that takes none.
      negative_prompt: None if there was none or it had no effect.
      true_cfg_scale: 1 without a negative prompt.
      batch_size: how many images a device drew together.
      tiled: whether it was decoded in tiles, if that is not what its size alone says: memory was
        short, or `FluxPipeline.vae_tiling` was set. None in records of earlier versions too.
      model: as it was named to `from_pretrained`.
      loras: beside its weights, each as PATH:SCALE.
      kernels, attention: as named to `FluxPipeline.use_kernels`; None where the choice was left,
        and in records of earlier versions.
      dtype: of the transformer's weights.
      fingerprint: of the model (`flux_jax.fingerprint`); None if not computed.
      version: of flux_jax.
      platform: the kind of device, "cpu" or "gpu".
    """

    prompt: str
    seed: int | None
    num_inference_steps: int
    height: int
    width: int
    max_sequence_length: int
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    batch_size: int = 1
    tiled: bool | None = None
    model: str | None = None
    loras: tuple[str, ...] = ()
    kernels: str | None = None
    attention: str | None = None
    dtype: str = "bfloat16"
    fingerprint: str | None = None
    version: str = ""
    platform: str = ""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline's call that draw the image again, on one device.

        On a mesh, `batch_size` counts the images of all its `data` devices.

        Raises:
          UserError: the record has no seed.
        """
        if self.seed is None:
            raise UserError(
                "this image cannot be drawn again: its noise came from a key or from given "
                "latents, not from a seed"
            )
        names = (
            "prompt",
            "seed",
            "num_inference_steps",
            "height",
            "width",
            "max_sequence_length",
            "negative_prompt",
            "true_cfg_scale",
            "batch_size",
        )
        chosen = {name: getattr(self, name) for name in names}
        if self.guidance_scale is not None:
            chosen["guidance_scale"] = self.guidance_scale
        return chosen


def readable(record: GenerationRecord) -> str:
    """The record as text: the prompts, then one line of settings."""
    settings = {
        "Steps": record.num_inference_steps,
        "Sampler": "Euler",
        "Distilled CFG scale": record.guidance_scale,
        "CFG scale": record.true_cfg_scale if record.negative_prompt is not None else None,
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": record.model,
        "Model hash": record.fingerprint,
        "LoRAs": " ".join(record.loras) or None,
        "Kernels": record.kernels,
        "Attention": record.attention,
        "Version": f"flux_jax {record.version}",
    }
    lines = [record.prompt]
    if record.negative_prompt is not None:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    lines.append(", ".join(f"{k}: {v}" for k, v in settings.items() if v is not None))
    return "\n".join(lines)


def save_png(image: Image.Image, path: str | Path, record: GenerationRecord | None = None) -> None:
    """Write a PNG, with the record inside it if there is one.

    The file is there whole or, if the process is killed, as it was before.

    Raises:
      UserError: the path does not end in .png, or cannot be written.
    """
    check_png_path(path)
    chunks = PngImagePlugin.PngInfo()
    if record is not None:
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(record)}
        # Without them, earlier versions read this record too.
        if not record.loras:
            del content["loras"]
        for name in ("tiled", "kernels", "attention"):
            if content[name] is None:
                del content[name]
        # JSON in ASCII survives every tool that rewrites text chunks.
        chunks.add_itxt(_CHUNK, json.dumps(content))
        # A path may be no UTF-8; only the JSON needs to say it exactly.
        chunks.add_itxt(_READABLE_CHUNK, readable(record).encode(errors="replace").decode())
    # Encoded before the file is touched: Pillow keeps the options of a save that failed and would
    # use them again in the next one.
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=chunks)
    write_whole(Path(path), encoded.getvalue())


def check_png_path(path: str | Path) -> None:
    """Refuse, before anything is computed, a path that `save_png` would refuse."""
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{path} must end in .png, the format that keeps the image exactly")


# What Pillow raises for a file that is no image, damaged, or too large to be decoded.
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)
# What every PNG begins with, and the chunk that it ends with: length, type and checksum.
_BEGINNING = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def is_whole_png(path: str | Path) -> bool:
    """Whether a file begins and ends as a PNG does, so that it was not cut off.

    Raises:
      OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        begins = file.read(len(_BEGINNING)) == _BEGINNING
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - len(_END)))
        return begins and file.read() == _END


def is_cut_off_png(path: str | Path) -> bool:
    """Whether a file is the beginning of a PNG, and not the whole; an empty file is.

    Raises:
      OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        found = file.read(len(_BEGINNING))
    return _BEGINNING.startswith(found) and not is_whole_png(path)


def read_png(path: str | Path, *, pixels: bool = True) -> GenerationRecord:
    """The record inside a PNG that `save_png` wrote.

    Args:
      path: of the file.
      pixels: whether to decode the image too, which finds any damage; else only a file that was cut
        off is found, at a hundredth of the time.

    Raises:
      UserError: no such file, not an image, no record in it, or one that cannot be understood.
    """
    return _read(path, decode=pixels)[1]


def read_picture(path: str | Path) -> tuple[Image.Image, GenerationRecord]:
    """The image, decoded, and the record of a PNG that `save_png` wrote.

    Raises:
      UserError: as `read_png`.
    """
    return _read(path, decode=True)


def _read(path: str | Path, *, decode: bool) -> tuple[Image.Image, GenerationRecord]:
    """The image, its pixels there with `decode` alone, and its record."""
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            elif not is_whole_png(path):
                raise SyntaxError("it is cut off")
            text = image.info.get(_CHUNK)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    if text is None:
        raise UserError(
            f"{path} carries no flux_jax metadata: not drawn by flux_jax, or a tool removed it"
        )
    return image, _parse(str(text), path)


def _parse(text: str, path: str | Path) -> GenerationRecord:
    content = parse_json(text, f"{path} has damaged flux_jax metadata")
    if not isinstance(content, dict) or content.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(
            f"{path} has flux_jax metadata of an unknown format; this version reads "
            f"format_version {FORMAT_VERSION}"
        )
    kinds = typing.get_type_hints(GenerationRecord)
    for name, value in content.items():
        # Unknown fields would be settings that a replay silently lost.
        if name not in kinds:
            raise UserError(f"{path} has flux_jax metadata with an unknown field {name!r}")
        if not fits(value, kinds[name]):
            raise UserError(
                f"{path} has flux_jax metadata whose {name} should be {kind_name(kinds[name])}, "
                f"got {value!r}"
            )
    if "loras" in content:
        content["loras"] = tuple(content["loras"])
    try:
        return GenerationRecord(**content)
    except TypeError as error:
        raise UserError(f"{path} has incomplete flux_jax metadata: {error}") from error
