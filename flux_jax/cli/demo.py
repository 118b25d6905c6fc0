"""`python -m flux_jax demo`: the shipped model and its 1.58-bit student, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flux_jax.assets import STUDENT, TEACHER, shipped_path
from flux_jax.cli import common

PROMPT = "a red circle above a blue square"
# Each picture is shown this large; the models draw 128 x 128.
SIDE, MARGIN, CAPTION = 384, 12, 34


@common.naming_options()
def demo(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")] = PROMPT,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Of the noise that both start from.")] = 0,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Draw one prompt with the model that ships with the package and with its 1.58-bit student.

    Both start from the same noise; the picture shows them side by side.

    \b
    Examples:
      python -m flux_jax demo
      python -m flux_jax demo "two green stars" --seed 3 --out stars.png
    """
    # Late: JAX takes a second, and --help should not.
    from flux_jax.compile_cache import enable_compilation_cache
    from flux_jax.images import psnr
    from flux_jax.metadata import save_png

    common.check_png_target(out)
    enable_compilation_cache()
    pictures, seconds, sizes = {}, {}, {}
    for name in (TEACHER, STUDENT):
        watch = common.Stopwatch()
        folder = shipped_path(name)
        loaded = common.load_and_encode(
            str(folder), {"prompt": prompt, "seed": seed}, dtype="bfloat16", with_fingerprint=False
        )
        with watch.stage("draw"):
            output = loaded.pipe(loaded.prompts, seed=seed, output_type="np", progress=not quiet)
        pictures[name], seconds[name] = output.images[0], watch.seconds["draw"]
        sizes[name] = transformer_bytes(folder)
    apart = float(psnr(pictures[STUDENT][None], pictures[TEACHER][None])[0])
    captions = {
        TEACHER: f"bf16, {sizes[TEACHER] / 1e6:.1f} MB",
        STUDENT: f"1.58 bit, {sizes[STUDENT] / 1e6:.1f} MB",
    }
    save_png(side_by_side(pictures, captions), out)
    if json:
        common.print_json(
            {
                "file": str(out),
                "prompt": prompt,
                "seed": seed,
                "transformer_bytes": sizes,
                "seconds": seconds,
                "psnr_db": round(apart, 2),
            }
        )
    elif not quiet:
        smaller = sizes[TEACHER] / sizes[STUDENT]
        typer.echo(f"{out}  teacher | student, seed {seed}: {prompt}")
        typer.echo(
            f"transformer on disk: {sizes[TEACHER] / 1e6:.2f} MB in bf16, "
            f"{sizes[STUDENT] / 1e6:.2f} MB at 1.58 bits ({smaller:.1f} times smaller); "
            f"the student's picture against the teacher's: {apart:.1f} dB (PSNR; higher is closer)"
        )


def transformer_bytes(folder: Path) -> int:
    """Bytes of a pipeline's transformer on disk, its configuration included."""
    return sum(file.stat().st_size for file in (folder / "transformer").iterdir())


def side_by_side(pictures: dict[str, Any], captions: dict[str, str]) -> Any:
    """One image of several, enlarged, each with its caption below.

    Args:
      pictures: (H, W, 3) arrays in [0, 1].
      captions: by the same names.

    Returns:
      A PIL image.
    """
    from PIL import Image, ImageDraw, ImageFont

    from flux_jax.images import to_pil

    width = len(pictures) * (SIDE + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, SIDE + MARGIN + CAPTION), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    for index, (name, picture) in enumerate(pictures.items()):
        left = MARGIN + index * (SIDE + MARGIN)
        large = to_pil(picture[None])[0].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        canvas.paste(large, (left, MARGIN))
        below = (left + SIDE // 2, MARGIN + SIDE + CAPTION // 2)
        draw.text(below, captions[name], fill="black", font=font, anchor="mm")
    return canvas
