"""Time a step on many devices, computed from one device's figures and the links' published rates.

    python -m benchmarks.scaling_times

A model of a few lines, to be held against what 2 and 4 devices measure:

- Arithmetic runs at the rate of one device (`transformer_step`). A distillation step is the forward
  passes of teacher and student, two for the gradient, and the recomputation of what blocks do not
  keep: all their products but the gated ones.
- Exchanges run at the links' full rate. Drawn out of the way of the arithmetic they cost nothing,
  else their sum: both are given, as "overlapped" and "one after the other".
- Within a host devices are joined by NVLink, between hosts by a network card each.

Of FLUX.1-dev with N parameters, distilled with fsdp = F in bf16 with float32 latent weights, every
device holds 14 N / F bytes (teacher, latent weights, moments). T of the N are multiplied by tokens;
the others, a quarter, make modulation vectors and stay where they are. It receives (F - 1) / F of 2
T bytes for the teacher, of T / 4 twice for the student's codes (forward and recomputation) and of 2
T for its gradients; then its part of all gradients, 2 N / F, is averaged over data = D, which takes
2 (D - 1) / D of it. One image on n devices (`flux_jax.sequence`) moves (n - 1) / n of 4 L C / n
numbers of two bytes in each block, of L tokens and width C.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import paper
from benchmarks.common import RESULTS, Figure, Out, Result, read_result, run
from benchmarks.machine import GIB
from flux_jax.configs import FluxConfig

# NVIDIA's data sheets: NVLink 4 is 900 GB/s a GPU, half of it each way; NDR InfiniBand is 400 Gb/s
# a card, and a DGX H200 has one for each GPU.
NVLINK = 450e9
NETWORK = 50e9
HOST = 8
# What starting an exchange takes, whatever its size: measured by none of us, and of this order.
LATENCY = 20e-6
STEPS = 28
# Name of a row: (data, fsdp).
DISTILL = {
    "2 devices, fsdp 2": (1, 2),
    "4 devices, fsdp 4": (1, 4),
    "8 devices, fsdp 8": (1, 8),
    "64 devices, data 8, fsdp 8": (8, 8),
    "64 devices, fsdp 64": (1, 64),
    "512 devices, data 64, fsdp 8": (64, 8),
    "512 devices, data 8, fsdp 64": (8, 64),
}
# Name of a row: (data, sequence).
GENERATE = {
    "1 device": (1, 1),
    "2 devices, sequence 2": (1, 2),
    "4 devices, sequence 4": (1, 4),
    "8 devices, sequence 8": (1, 8),
    "4 devices, data 4": (4, 1),
    "64 devices, data 64": (64, 1),
    "64 devices, data 16, sequence 4": (16, 4),
    "512 devices, data 512": (512, 1),
    "512 devices, data 128, sequence 4": (128, 4),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step on one device.

    Attributes:
      compute: arithmetic.
      exchange: bytes over the links, at their full rate.
    """

    compute: float
    exchange: float

    @property
    def sequential(self) -> float:
        """If nothing overlaps."""
        return self.compute + self.exchange

    @property
    def overlapped(self) -> float:
        """If all of it does."""
        return max(self.compute, self.exchange)


def gathered_seconds(nbytes: float, devices: int) -> float:
    """Until each of `devices` has all of `nbytes`, of which it had its part.

    Of what a host lacks, each of its network cards brings a share, while NVLink spreads what came.
    """
    within = nbytes * (devices - 1) / devices / NVLINK
    hosts = -(-devices // HOST)
    between = nbytes * (hosts - 1) / hosts / (HOST * NETWORK)
    return max(within, between)


def recomputed_share(config: FluxConfig, step: paper.Step) -> float:
    """Share of a forward pass that the gradient computes once more (`FluxTransformer.velocity`)."""
    gated = {"img proj", "img mlp out", "txt proj", "txt mlp out", "linear2"}
    products = paper.products(config, step)
    again = sum(product.flops for product in products if product.name not in gated)
    whole = sum(product.flops for product in products) + paper.attention_flops(config, step)
    return again / whole


def modulation_parameters(config: FluxConfig) -> float:
    """Weights that are multiplied by one vector for each example."""
    vectors = 12 * config.depth + 3 * config.depth_single_blocks + 2
    return float(vectors * config.hidden_size**2)


def distill_step(
    config: FluxConfig, step: paper.Step, forward: float, data: int, fsdp: int
) -> Times:
    """One step with one state on each device.

    Args:
      config, step: the transformer, and a state's tokens.
      forward: seconds of a forward pass.
      data, fsdp: the mesh's axes; fsdp joins neighbours.
    """
    parameters = paper.parameter_count(config)
    moved = parameters - modulation_parameters(config)
    gathered = (2.0 + 2 / 4 + 2.0) * moved
    # Those that share a part of the parameters are on as many hosts, unless all is on one.
    link = NVLINK if data * fsdp <= HOST else NETWORK
    averaged = 2.0 * (data - 1) / data * 2.0 * parameters / fsdp / link
    return Times(
        compute=(4 + recomputed_share(config, step)) * forward,
        exchange=gathered_seconds(gathered, fsdp) + averaged,
    )


def image_step(config: FluxConfig, step: paper.Step, forward: float, sequence: int) -> Times:
    """One denoising step of one image.

    Args:
      config, step: the transformer, and its tokens.
      forward: seconds of it on one device.
      sequence: devices that share the image, on one host.
    """
    blocks = config.depth + config.depth_single_blocks
    numbers = 4.0 * step.tokens * config.hidden_size / sequence * (sequence - 1) / sequence
    exchange = blocks * (2.0 * numbers / NVLINK + 2 * LATENCY) if sequence > 1 else 0.0
    return Times(compute=forward / sequence, exchange=exchange)


def measured_rows(directory: Path) -> dict[str, Figure]:
    """What `benchmarks.scaling` measured, under the names of the rows here."""
    found: dict[str, Figure] = {}
    for name, (data, fsdp) in DISTILL.items():
        for result in map(read_result, sorted(directory.glob("scaling_distill_*.json"))):
            step = result.figures.get(f"{fsdp} devices, fsdp, adamw/step")
            if step is not None and data == 1 and result.benchmark == "scaling_distill":
                found[f"distill, {name}/measured"] = step
    for name, (data, sequence) in GENERATE.items():
        devices = data * sequence
        how = "one image" if data == 1 else "an image each"
        row = f"{devices} device{'s' if devices > 1 else ''}, {how}, bf16/seconds"
        for result in map(read_result, sorted(directory.glob("scaling_generate_*.json"))):
            taken = result.figures.get(row)
            if taken is not None and 1 in (data, sequence):
                note = "an image's time over its steps, decoder included"
                value = 1e3 * taken.value / STEPS
                found[f"draw, {name}/measured"] = Figure(value=value, unit="ms", note=note)
    return found


def figures(measured: Result) -> dict[str, Figure]:
    """Every row, from `transformer_step`'s figures of one device."""
    config, step = FluxConfig.dev(), paper.Step()
    parameters = paper.parameter_count(config)
    forward = measured.figures["step_ms"].value / 1e3
    hoisted = measured.figures["step_ms/hoisted"].value / 1e3
    activations = sum(paper.activation_bytes(config, step).values())
    found: dict[str, Figure] = {}
    for name, (data, fsdp) in DISTILL.items():
        times = distill_step(config, step, forward, data, fsdp)
        states = data * fsdp
        found |= {
            f"distill, {name}/compute": Figure(value=times.compute * 1e3, unit="ms"),
            f"distill, {name}/exchange": Figure(value=times.exchange * 1e3, unit="ms"),
            f"distill, {name}/overlapped": Figure(value=times.overlapped * 1e3, unit="ms"),
            f"distill, {name}/sequential": Figure(value=times.sequential * 1e3, unit="ms"),
            f"distill, {name}/rate": Figure(value=states / times.sequential, unit="states/s"),
            f"distill, {name}/memory": Figure(
                value=14.0 * parameters / fsdp / GIB, unit="GiB", note="held between steps"
            ),
        }
    for name, (data, sequence) in GENERATE.items():
        times = image_step(config, step, hoisted, sequence)
        found |= {
            f"draw, {name}/compute": Figure(value=times.compute * 1e3, unit="ms"),
            f"draw, {name}/exchange": Figure(value=times.exchange * 1e3, unit="ms"),
            f"draw, {name}/sequential": Figure(value=times.sequential * 1e3, unit="ms"),
            f"draw, {name}/rate": Figure(
                value=data / times.sequential / STEPS, unit="images/s", note="28 steps, no decoder"
            ),
            f"draw, {name}/memory": Figure(
                value=(2.0 * parameters + activations / sequence) / GIB,
                unit="GiB",
                note="weights in bf16, and activations",
            ),
        }
    return found


def main(
    source: Annotated[Path, typer.Option(help="Figures of one device.")] = RESULTS
    / "transformer_step_nvidia-h200.json",
    out: Out = RESULTS,
) -> None:
    """Compute every row and write the figures."""
    result = Result(
        benchmark="scaling_times",
        device="paper, from one NVIDIA H200",
        figures=figures(read_result(source)) | measured_rows(RESULTS),
    )
    for name, figure in result.figures.items():
        if name.endswith("/sequential"):
            print(f"  {name.removesuffix('/sequential'):45} {figure.value:8.1f} ms")
    print(f"written: {result.write(out).name}")


if __name__ == "__main__":
    run(main)
