"""Options that several commands of `ternary` share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "tiny, a diffusers folder or hub id, a Black Forest Labs file, or a Flax checkpoint."

_PROMPTS_HELP = "UTF-8 text, one prompt a line."

Teacher = Annotated[str, typer.Option(help=MODEL_HELP, show_default=False)]
PromptFile = Annotated[Path, typer.Option(help=_PROMPTS_HELP, show_default=False)]
# Of a command that asks for them itself.
TeacherOrNone = Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="required")]
PromptFileOrNone = Annotated[Path | None, typer.Option(help=_PROMPTS_HELP, show_default="required")]
Granularity = Annotated[
    str, typer.Option(help="What shares a scale: tensor, channel, or group128.")
]
ActivationBits = Annotated[
    int, typer.Option(help="16, or 8 for int8 activations with a scale per token.")
]
Refit = Annotated[
    int, typer.Option(min=0, help="Least-squares refits of the scale after the absolute mean.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Linears to be ternary, by pattern (`*` stands for anything); may be repeated.",
        show_default="every linear of every block",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Linears that stay as they are; may be repeated.", show_default="none"),
]
