"""`python -m ternary quantize`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.command_line import Force, Json, Quiet
from ternary.commands.options import (
    MODEL_HELP,
    ActivationBits,
    Exclude,
    Granularity,
    Include,
    Refit,
)
from ternary.commands.telling import tell_checkpoint


def quantize(
    src: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP, show_default=False)],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to be made.", show_default=False)
    ],
    granularity: Granularity = "channel",
    activation_bits: ActivationBits = 16,
    refit: Refit = 0,
    include: Include = None,
    exclude: Exclude = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Round a transformer to ternary weights, without training.

    The target is a whole pipeline in diffusers' layout whose transformer is ternary; the other
    parts are copied. It appears complete or not at all.

    \b
    Examples:
      python -m ternary quantize tiny OUT
      python -m ternary quantize black-forest-labs/FLUX.1-dev OUT --granularity group128 --refit 3
    """
    # Late: JAX takes a second, and --help should not.
    from tqdm import tqdm

    from ternary.config import QuantConfig
    from ternary.policy import DEFAULT_PATTERNS, Policy
    from ternary.storage.rounding import quantize_checkpoint

    quant = QuantConfig(granularity=granularity, activation_bits=activation_bits, refit_steps=refit)
    policy = Policy(include=tuple(include or DEFAULT_PATTERNS), exclude=tuple(exclude or ()))
    bar = tqdm(unit="B", unit_scale=True, desc="quantize", disable=True)
    with contextlib.ExitStack() as stack:

        def start(nbytes: int) -> None:
            # Not before the source is open: what cannot be read is refused in one line.
            nonlocal bar
            options: Any = {"total": nbytes, "unit": "B", "unit_scale": True}
            bar = tqdm(desc="quantize", disable=quiet, file=sys.stderr, **options)
            stack.enter_context(bar)

        def advance(nbytes: int) -> None:
            bar.update(nbytes)

        counted = quantize_checkpoint(
            src,
            dst,
            quant,
            policy,
            force=force,
            on_start=start,
            on_bytes=advance,
        )
    tell_checkpoint(dst, counted, json=json, quiet=quiet)
