"""What a LoRA beside the weights costs a step: FLUX.1-dev's shapes, random weights.

    python -m benchmarks.lora              # a GPU with 48 GB, some minutes
    python -m benchmarks.lora --tiny       # anywhere

A LoRA changes every linear of the blocks but the modulations, as most trainers do. A picture's 28
steps are timed, latents only, and divided by their number.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import typer

from benchmarks import paper
from benchmarks.common import RESULTS, Commit, Figure, Out, Result, Tiny
from benchmarks.machine import GIB, device_figures, git_commit
from flux_jax.configs import AutoencoderConfig, FluxConfig, SchedulerConfig
from flux_jax.errors import exit_on_user_error

if TYPE_CHECKING:
    from flux_jax.lora import LoRA
    from flux_jax.pipeline import FluxPipeline
    from flux_jax.prompt_embeds import PromptEmbeds

app = typer.Typer(add_completion=False, rich_markup_mode=None)
STEPS, REPEATS = 28, 3
# Activation bits (None: dense weights in bf16) and ranks, 0 for no LoRA.
ROWS = ((8, (0, 16, 64)), (None, (0, 16)), (16, (0, 16)))


def random_lora(config: FluxConfig, rank: int) -> LoRA:
    """A LoRA of the blocks' attention and MLP linears."""
    from flux_jax.lora import LoRA, LowRank, linear_shapes

    rng = np.random.default_rng(rank)
    layers = {}
    for path, (rows, columns) in linear_shapes(config).items():
        if "_blocks." in path and "_mod." not in path and "modulation" not in path:
            a = rng.standard_normal((rank, columns), np.float32) / columns**0.5
            layers[path] = LowRank(a, 0.1 * rng.standard_normal((rows, rank), np.float32))
    return LoRA(path="random", layers=layers)


def measure(pipe: FluxPipeline, embeds: PromptEmbeds, steps: int) -> dict[str, Figure]:
    """Milliseconds of a step, and GiB of the transformer's weights, LoRAs included."""
    import jax

    seconds = []
    for seed in range(REPEATS + 1):
        begun = time.perf_counter()
        pipe(
            embeds,
            seed=seed,
            num_inference_steps=steps,
            max_sequence_length=embeds.prompt_embeds.shape[1],
            output_type="latent",
            progress=False,
        )
        seconds.append(time.perf_counter() - begun)
    step = statistics.median(seconds[1:]) / steps
    figures = {"step": Figure(value=1e3 * step, unit="ms", note=f"of {steps}, latents only")}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.transformer))
    figures["weights"] = Figure(value=weights / GIB, unit="GiB")
    return figures


@app.command()
def main(tiny: Tiny = False, out: Out = RESULTS, commit: Commit = None) -> None:
    """Time a step with and without a LoRA, for each kind of weights."""
    from benchmarks.random_models import random_autoencoder, random_embeds, random_transformer
    from flux_jax.pipeline import FluxPipeline

    flux = FluxConfig.tiny() if tiny else FluxConfig.dev()
    vae = AutoencoderConfig.tiny() if tiny else AutoencoderConfig.flux()
    text = paper.SIZES["tiny" if tiny else "full"][1].text_tokens
    loras = {rank: random_lora(flux, rank) for _, ranks in ROWS for rank in ranks if rank}
    found: dict[str, Figure] = {}
    for bits, ranks in ROWS:
        weights = "bf16" if bits is None else f"W1.58A{bits}"
        pipe = FluxPipeline(
            transformer=random_transformer(flux, activation_bits=bits),
            vae=random_autoencoder(vae),
            scheduler=SchedulerConfig.dev(),
        )
        for rank in ranks:
            if rank:
                pipe.add_lora(loras[rank])
            row = weights if not rank else f"{weights}, a LoRA of rank {rank}"
            figures = measure(pipe, random_embeds(flux, 1, text), steps=4 if tiny else STEPS)
            if rank:
                alone = found[f"{weights}/step"].value
                figures["times"] = Figure(value=figures["step"].value / alone, unit="x")
            print(
                "  "
                + ", ".join([row, *(f"{n} {f.value:.4g} {f.unit}" for n, f in figures.items())])
            )
            found |= {f"{row}/{measure}": figure for measure, figure in figures.items()}
            pipe.unload_loras()
        del pipe
        # After each kind: compiling takes minutes, and a run that is cut off keeps what it has.
        name, device = "lora_tiny" if tiny else "lora", device_figures()["device"]
        result = Result(benchmark=name, device=device, figures=found, commit=commit or git_commit())
        print(f"written: {result.write(out).name}")


if __name__ == "__main__":
    with exit_on_user_error():
        app()
