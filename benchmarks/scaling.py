"""Distillation and drawing on 1, 2, 4 and 8 GPUs of one host: FLUX.1-dev's shapes, random weights.

    python -m benchmarks.scaling distill --devices 2     # then 4, 8
    python -m benchmarks.scaling generate --devices 1    # then 2, 4, 8
    python -m benchmarks.scaling generate --devices 4 --ternary
    python -m benchmarks.scaling distill --devices 2 --tiny     # anywhere

Each run adds its rows to `benchmarks/results/scaling_<what>_<device>.json` and takes a few minutes;
the rows of other numbers of devices stay, and what compares them is computed anew. Compiling a
training step takes four minutes, in which the devices idle: with JAX_COMPILATION_CACHE_DIR set,
`distill --only-compile` does it ahead, for several numbers of devices side by side.

Distillation: `--steps` training steps with one state a device, split over fsdp. Model-FLOP
utilisation counts a forward pass for the teacher and three for the student (the gradient is two),
not the recomputation, against the bf16 rate that `transformer_step`'s products reach, each timed
alone, on the same kind of device.

Drawing: one image split over all devices, and one image a device, 28 steps and the decoder, waited
for. Prompts are not encoded: their embeddings are random.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks import paper
from benchmarks.common import RESULTS, Commit, Figure, Out, Result, Tiny, read_result
from benchmarks.joining import at_commit, noted, noted_commit
from benchmarks.machine import GIB, device_figures, git_commit
from flux_jax.configs import AutoencoderConfig, FluxConfig, SchedulerConfig
from flux_jax.errors import exit_on_user_error

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flux_jax.pipeline import FluxPipeline
    from flux_jax.prompt_embeds import PromptEmbeds

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
Devices = Annotated[int, typer.Option(min=1, help="How many, from the first.")]


def dense_rate(directory: Path, device: str) -> float | None:
    """FLOP/s of the step's bf16 products alone, measured on such a device; None if it was not."""
    for path in directory.glob("transformer_step_*.json"):
        found = read_result(path)
        if found.device == device and "floor_linears_ms" in found.figures:
            work = found.figures["paper_linears_tflop"].value * 1e12
            return work / (found.figures["floor_linears_ms"].value / 1e3)
    return None


def forward_flops(config: FluxConfig, step: paper.Step) -> float:
    """Operations of one pass through the transformer."""
    linears = sum(product.flops for product in paper.products(config, step))
    return linears + paper.attention_flops(config, step)


def peak_gib() -> float | None:
    """The most memory that was in use on any device; None where it is not told."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks) / GIB if peaks else None


def merged(result: Result, directory: Path, row: str) -> Result:
    """`result` with the rows of earlier runs on such a device, this run's `row` replaced.

    Raises:
      ResultError: the earlier file cannot be read.
    """
    path = directory / result.file_name
    kept: dict[str, Figure] = {}
    if path.exists():
        earlier = read_result(path)
        others = {n: f for n, f in earlier.figures.items() if n.rpartition("/")[0] != row}
        at = "" if earlier.commit == result.commit else at_commit(earlier.commit)
        # What an earlier run noted is of a commit before that.
        kept = {n: f if noted_commit(f) else noted(f, at) for n, f in others.items()}
    rows = {**kept, **result.figures}
    ordered = sorted(rows, key=lambda name: (int(name.split()[0]), name.rpartition("/")[0]))
    return dataclasses.replace(result, figures={name: rows[name] for name in ordered})


def with_scaling(figures: Mapping[str, Figure], measure: str, base: int) -> dict[str, Figure]:
    """Each row's rate over that of `base` devices, where both are there.

    Rows are called "<devices> devices, ..." or "1 device, ...".
    """
    found = {name: f for name, f in figures.items() if not name.endswith("/scaling")}
    rows = [name.rpartition("/")[0] for name in found if name.endswith(f"/{measure}")]
    for row in rows:
        for other in rows:
            same = row.partition(",")[2] == other.partition(",")[2]
            mine, theirs = (noted_commit(found[f"{each}/{measure}"]) for each in (row, other))
            # Of one commit alone.
            same = same and mine == theirs
            if same and int(other.split()[0]) == base < int(row.split()[0]):
                times = found[f"{row}/{measure}"].value / found[f"{other}/{measure}"].value
                note = f"{measure} over that of {base} device{'s' if base > 1 else ''}"
                found[f"{row}/scaling"] = Figure(value=times, unit="x", note=note)
    order = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].rpartition("/")[0])))


def write(
    benchmark: str,
    row: str,
    figures: dict[str, Figure],
    *,
    out: Path,
    base: int,
    commit: str | None,
) -> None:
    """Add a row to a result file."""
    named = {f"{row}/{measure}": figure for measure, figure in figures.items()}
    device = device_figures()["device"]
    found = Result(benchmark=benchmark, device=device, figures=named, commit=commit or git_commit())
    result = merged(found, out, row)
    result = dataclasses.replace(result, figures=with_scaling(result.figures, "rate", base))
    for measure in figures:
        figure = result.figures[f"{row}/{measure}"]
        print(f"  {row}: {measure} {figure.value:.4g} {figure.unit}")
    print(f"written: {result.write(out).name}")


def row_name(devices: int, how: str) -> str:
    """What a row is called."""
    return f"{devices} device{'s' if devices > 1 else ''}, {how}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What some training steps took.

    Attributes:
      compile: seconds, before the first.
      seconds, losses: of each step.
    """

    compile: float
    seconds: list[float]
    losses: list[float]


def train(
    flux: FluxConfig, size: paper.Step, *, devices: int, steps: int, optimizer: str
) -> Trained:
    """Distil at random states, one on each device, everything split over fsdp.

    Args:
      flux, size: the transformer, and the tokens of a state.
      devices: how many, from the first.
      steps: of the training; with 0 its step is only compiled.
      optimizer: as in `DistillConfig`.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.distill_setup import Setup
    from benchmarks.random_models import random_transformer
    from flux_jax.sharding import make_mesh
    from flux_jax.tree import split_flat
    from ternary.config import DistillConfig

    mesh = make_mesh(fsdp=devices)
    teacher = random_transformer(flux, mesh=mesh) if steps else None
    setup = Setup.of(
        flux,
        mesh,
        DistillConfig(steps=1000, learning_rate=1e-4, warmup=5, remat=True, optimizer=optimizer),
        tokens=size.image_tokens,
        text=size.text_tokens,
        batch=devices,
        teacher=teacher,
    )
    begun = time.perf_counter()
    program = setup.compiled()
    compiled = time.perf_counter() - begun
    print(f"  compiled in {compiled:.0f} s", flush=True)
    if teacher is None:
        return Trained(compile=compiled, seconds=[], losses=[])
    state, weights = setup.start.from_teacher(), split_flat(teacher)[1]
    draw = jax.jit(
        lambda key: jax.tree.map(
            lambda row: jax.random.normal(key, row.shape, jnp.float32).astype(row.dtype),
            setup.rows,
        ),
        out_shardings=jax.tree.map(lambda row: row.sharding, setup.rows),
    )
    rows = draw(jax.random.key(1))
    losses, seconds = [], []
    for number in range(1, steps + 1):
        begun = time.perf_counter()
        state, metrics = program(state, weights, rows)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - begun)
        if number % 10 == 0:
            ms = 1e3 * statistics.median(seconds[-5:])
            print(f"  step {number} of {steps}: {ms:.0f} ms, loss {losses[-1]:.4g}", flush=True)
    return Trained(compile=compiled, seconds=seconds, losses=losses)


@app.command()
def distill(
    devices: Devices,
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 50,
    optimizer: Annotated[str, typer.Option(help="adamw, lion or adafactor.")] = "adamw",
    only_compile: Annotated[
        bool, typer.Option("--only-compile", help="Fill JAX's cache, which takes no memory.")
    ] = False,
    tiny: Tiny = False,
    out: Out = RESULTS,
    commit: Commit = None,
) -> None:
    """Distil at random states; time, loss, memory and utilisation."""
    flux = FluxConfig.tiny() if tiny else FluxConfig.dev()
    size = paper.SIZES["tiny" if tiny else "full"][1]
    if only_compile:
        train(flux, size, devices=devices, steps=0, optimizer=optimizer)
        return
    found = train(flux, size, devices=devices, steps=steps, optimizer=optimizer)
    tenth = max(1, steps // 10)
    first, last = statistics.fmean(found.losses[:tenth]), statistics.fmean(found.losses[-tenth:])
    if not last < first:
        raise SystemExit(f"error: the loss did not fall: {first:.4f} at first, {last:.4f} at last")
    step = statistics.median(found.seconds[tenth:])
    figures = {
        "step": Figure(value=1e3 * step, unit="ms", note="median, each waited for"),
        "rate": Figure(value=devices / step, unit="states/s"),
        "first_loss": Figure(value=first, unit="count", note=f"mean of {tenth} steps"),
        "last_loss": Figure(value=last, unit="count", note=f"mean of {tenth} steps"),
        "compile": Figure(value=found.compile, unit="s"),
    }
    if (peak := peak_gib()) is not None:
        figures["peak"] = Figure(value=peak, unit="GiB", note="largest of all devices")
    if (rate := dense_rate(RESULTS, device_figures()["device"])) is not None and not tiny:
        used = 4 * forward_flops(flux, size) / step / rate
        figures["utilisation"] = Figure(value=used, unit="share", note="of its products' bf16 rate")
    name = "scaling_distill_tiny" if tiny else "scaling_distill"
    row = row_name(devices, f"fsdp, {optimizer}")
    write(name, row, figures, out=out, base=2, commit=commit)


def drawing_meshes(devices: int) -> dict[str, Mesh]:
    """The first devices for one image, and, if they are several, for an image on each."""
    from flux_jax.sharding import make_mesh

    meshes = {"one image": make_mesh(sequence=devices)}
    return meshes if devices == 1 else {**meshes, "an image each": make_mesh(data=devices)}


def draw(
    pipe: FluxPipeline, embeds: PromptEmbeds, *, steps: int, repeats: int
) -> dict[str, Figure]:
    """Time and memory of drawing, as a row's figures.

    Args:
      pipe: what draws.
      embeds: the encoded prompts, an image for each.
      steps: denoising steps.
      repeats: timed calls, after one that compiles.
    """
    count = len(embeds.prompts)

    def timed(output_type: str) -> float:
        begun = time.perf_counter()
        pipe(
            embeds,
            seed=0,
            num_inference_steps=steps,
            max_sequence_length=embeds.prompt_embeds.shape[1],
            output_type=output_type,
            progress=False,
        )
        return time.perf_counter() - begun

    seconds = [timed("np") for _ in range(repeats + 1)]
    taken = statistics.median(seconds[1:])
    latents = statistics.median(timed("latent") for _ in range(repeats))
    figures = {
        "seconds": Figure(value=taken, unit="s", note=f"{steps} steps and the decoder"),
        "latents": Figure(value=latents, unit="s", note="the same without the decoder"),
        "rate": Figure(value=count / taken, unit="images/s"),
        "first": Figure(value=seconds[0], unit="s", note="compilation included"),
    }
    if (peak := peak_gib()) is not None:
        figures["peak"] = Figure(value=peak, unit="GiB", note="largest of all devices")
    return figures


@app.command()
def generate(
    devices: Devices,
    ternary: Annotated[bool, typer.Option("--ternary", help="W1.58A8 in place of bf16.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 28,
    tiny: Tiny = False,
    out: Out = RESULTS,
    commit: Commit = None,
) -> None:
    """Draw one image on all devices, and one on each; seconds, memory, scaling."""
    from benchmarks.random_models import random_autoencoder, random_embeds, random_transformer
    from flux_jax.pipeline import FluxPipeline

    flux = FluxConfig.tiny() if tiny else FluxConfig.dev()
    vae = AutoencoderConfig.tiny() if tiny else AutoencoderConfig.flux()
    text = paper.SIZES["tiny" if tiny else "full"][1].text_tokens
    bits = 8 if ternary else None
    rows: dict[str, dict[str, Figure]] = {}
    # In this order, as a peak is that of the process so far: an image on each device needs more
    # than a share of one.
    for how, mesh in drawing_meshes(devices).items():
        pipe = FluxPipeline(
            transformer=random_transformer(flux, activation_bits=bits, mesh=mesh),
            vae=random_autoencoder(vae, mesh),
            scheduler=SchedulerConfig.dev(),
        )
        embeds = random_embeds(flux, mesh.shape["data"], text)
        rows[how] = draw(pipe, embeds, steps=steps, repeats=repeats)
        del pipe
    rows.setdefault("an image each", rows["one image"])
    name = "scaling_generate_tiny" if tiny else "scaling_generate"
    weights = "W1.58A8" if ternary else "bf16"
    for how, figures in rows.items():
        row = row_name(devices, f"{how}, {weights}")
        write(name, row, figures, out=out, base=1, commit=commit)


if __name__ == "__main__":
    with exit_on_user_error():
        app()
