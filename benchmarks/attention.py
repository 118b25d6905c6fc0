"""Times every implementation of attention that runs here, and what each is off by.

    python -m benchmarks.attention               # FLUX.1's shape: 4608 tokens, 24 heads of 128
    python -m benchmarks.attention --tiny        # the shipped model's, anywhere

- ms, tflops: median over calls queued on several sets of random inputs in bfloat16.
- error: root mean square of the difference from float64, over that of the result; some queries of
  every head.
- psnr: of the shipped 1.58-bit model's pictures against those drawn with the plain XLA attention,
  the median over prompts. Implementations that do not suit the shipped model's heads have none.

An implementation that cannot run is left out, after its reason. Writes
`benchmarks/results/attention_<device>.json`.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from benchmarks.common import RESULTS, Commit, Figure, OutOrNone, Result, Tiny, median_seconds, run
from benchmarks.machine import device_figures, git_commit, package_versions
from flux_jax.assets import STUDENT
from flux_jax.attention import IMPLEMENTATIONS, Implementation, attention, why_not
from flux_jax.errors import UserError
from flux_jax.images import psnr
from flux_jax.pipeline import FluxPipeline

SHAPE, TINY = (1, 4608, 24, 128), (1, 112, 8, 32)
INPUT_SETS, CALLS = 4, 8
# Queries whose exact result is computed, on the host.
EXACT_QUERIES = 64
PROMPTS = (
    "a red circle above a blue square",
    "three green stars",
    "a yellow triangle",
    "two purple hearts",
)

Inputs = tuple[jax.Array, jax.Array, jax.Array]


def random_inputs(shape: tuple[int, int, int, int], seed: int) -> Inputs:
    """q, k, v in bfloat16, of unit variance as the model's norms leave q and k."""
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    return q, k, v


def relative_error(found: Any, inputs: Inputs) -> float:
    """The error of `EXACT_QUERIES` evenly spaced queries, against float64 of rounded inputs."""
    q, k, v = (np.asarray(x, np.float64) for x in inputs)
    rows = np.unique(np.linspace(0, q.shape[1] - 1, EXACT_QUERIES).astype(int))
    scores = np.einsum("bqhd,bkhd->bhqk", q[:, rows], k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    difference = np.asarray(found, np.float64)[:, rows] - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def measure(
    name: Implementation, shape: tuple[int, int, int, int], repeats: int
) -> dict[str, Figure]:
    """Time, rate and error of one implementation."""
    sets = [random_inputs(shape, seed) for seed in range(INPUT_SETS)]
    run = jax.jit(lambda q, k, v: attention(q, k, v, implementation=name))
    error = relative_error(run(*sets[0]), sets[0])
    seconds = median_seconds(
        run, sets, wait=jax.block_until_ready, repeats=repeats, calls=min(CALLS, 4 * repeats)
    )
    batch, tokens, heads, width = shape
    operations = 4.0 * batch * heads * tokens**2 * width
    return {
        f"{name}/ms": Figure(value=1e3 * seconds, unit="ms"),
        f"{name}/tflops": Figure(value=operations / seconds / 1e12, unit="TFLOP/s"),
        f"{name}/error": Figure(value=error, unit="x", note="relative to float64"),
    }


def picture_figures(names: list[Implementation], steps: int) -> dict[str, Figure]:
    """How far each implementation's pictures are from those of the plain XLA attention."""
    pipe = FluxPipeline.from_pretrained(STUDENT, attention="xla")

    def draw() -> np.ndarray:
        call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
        return np.asarray(pipe(list(PROMPTS), seed=0, progress=False, **call).images)

    reference, figures = draw(), {}
    for name in names:
        try:
            pipe.use_kernels(attention=name)
            distance = float(np.median(psnr(draw(), reference)))
        except (UserError, NotImplementedError) as reason:
            print(f"  no picture: {reason}", flush=True)
            continue
        note = f"{len(PROMPTS)} prompts, {steps} steps, against xla"
        figures[f"{name}/psnr"] = Figure(value=distance, unit="dB", note=note)
    return figures


def main(
    tiny: Tiny = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timings that each median is over.")] = 15,
    pictures: Annotated[bool, typer.Option(help="Draw with the shipped model too.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 28,
    out: OutOrNone = None,
    commit: Commit = None,
) -> None:
    """Compare the implementations of attention."""
    shape = TINY if tiny else SHAPE
    figures: dict[str, Figure] = {}
    q, k, _ = random_inputs(shape, 0)
    runnable: list[Implementation] = []
    for name in IMPLEMENTATIONS:
        if reason := why_not(name, q, k, masked=False):
            print(f"{name:10} not here: {reason}", flush=True)
            continue
        runnable.append(name)
        measured = measure(name, shape, repeats)
        figures |= measured
        parts = (f"{f.value:.4g} {f.unit}" for f in measured.values())
        print(f"{name:10} {', '.join(parts)}", flush=True)
    if pictures:
        drawn = picture_figures([name for name in runnable if name != "xla"], steps)
        figures |= drawn
        for name, figure in drawn.items():
            print(f"{name:15} {figure.value:.1f} dB", flush=True)
    result = Result(
        benchmark="attention_tiny" if tiny else "attention",
        device=device_figures()["device"],
        figures=figures,
        versions=package_versions("jax", "jaxlib", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
        | package_versions("tokamax"),
        commit=commit or git_commit(),
    )
    if out is not None or not tiny:
        print(f"written: {result.write(out or RESULTS).name}")


if __name__ == "__main__":
    run(main)
