"""Draw a captioned grid of prompts with the shipped model: the picture in the README.

python -m examples.gallery --out docs/images/tiny.png
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from flux_jax import FluxPipeline

PROMPTS = (
    "a red circle above a blue square",
    "three purple hearts on a white background",
    "a green star to the left of an orange diamond",
    "a tiny yellow triangle and a huge cyan ring",
    "four pink crosses on black",
    "two blue stars and a red heart",
    "a photo of an orange ring",
    "a green square, a pink circle and a yellow star",
)
_SIDE, _CAPTION, _COLUMNS, _GAP = 192, 44, 4, 8


def main(
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("gallery.png"),
    seed: Annotated[int, typer.Option(help="Of the first picture; the next take the next.")] = 0,
) -> None:
    """Draw eight prompts and lay them out with their captions."""
    pipe = FluxPipeline.from_pretrained("tiny")
    images = pipe(list(PROMPTS), seed=seed).images
    rows = -(-len(images) // _COLUMNS)
    width = _COLUMNS * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, rows * (_SIDE + _CAPTION + _GAP) + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        x = _GAP + index % _COLUMNS * (_SIDE + _GAP)
        y = _GAP + index // _COLUMNS * (_SIDE + _CAPTION + _GAP)
        sheet.paste(image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), outline="#bbbbbb")
        pen.text((x + 2, y + _SIDE + 4), textwrap.fill(prompt, 28), fill="#222222", font=font)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    typer.run(main)
