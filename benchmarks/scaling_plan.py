"""Memory a device for distilling FLUX.1-dev on meshes of up to 512 devices, planned by XLA.

    python -m benchmarks.scaling_plan

Nothing runs: the training step is compiled ahead for simulated CPU devices, from shapes alone, and
XLA says what a device would hold. Compiled at full width with one and two blocks of each kind, and
extrapolated to 19 and 38: blocks of a kind are alike, so what a second one adds, each further one
adds. Three parts:

- held: latent weights, moments, teacher and trajectories, between steps. Exact.
- weights: what a step holds of them beside that, gathered, or as gradients. Compiled with few
  tokens, so that it is little else. An upper bound: a CPU computes bf16 products in float32.
- activations: on paper. XLA's CPU backend drops the barriers that keep a recomputed block in its
  place, recomputes all of them early, and has no fused attention. What must be there is each
  block's input, and in the gradient of one block three times what its forward pass holds at its
  widest: the values, their gradients, and both in float32 on the way.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Annotated, Any

import typer

from benchmarks import paper
from benchmarks.common import RESULTS, Figure, Out, Result, run
from benchmarks.machine import GIB
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError

DEVICES = 512
DEPTHS = ((1, 1), (2, 1), (1, 2))
FULL = (19, 38)
# Name of a row: (data, fsdp, tensor).
MESHES = {
    "8 devices, fsdp 8": (1, 8, 1),
    "64 devices, data 8, fsdp 8": (8, 8, 1),
    "64 devices, fsdp 64": (1, 64, 1),
    "512 devices, data 64, fsdp 8": (64, 8, 1),
    "512 devices, data 8, fsdp 64": (8, 64, 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """What one device holds.

    Attributes:
      arguments: state, teacher and text before a step.
      work: everything else during it.
    """

    arguments: float
    work: float


def planned(
    depth: int, singles: int, axes: tuple[int, int, int], *, tokens: int, text: int, width: int
) -> Bytes:
    """Compile one step, for one state a device.

    Args:
      depth, singles: blocks of each kind.
      axes: data, fsdp, tensor.
      tokens: image tokens, a square.
      text: text tokens.
      width: of the model, a multiple of 128; 3072 for FLUX.1-dev.
    """
    from benchmarks.distill_setup import Setup
    from flux_jax.sharding import make_mesh
    from ternary.config import DistillConfig

    data, fsdp, tensor = axes
    flux = dataclasses.replace(
        FluxConfig.dev(),
        depth=depth,
        depth_single_blocks=singles,
        hidden_size=width,
        num_heads=width // 128,
    )
    setup = Setup.of(
        flux,
        make_mesh(data=data, fsdp=fsdp, tensor=tensor),
        DistillConfig(remat=True),
        tokens=tokens,
        text=text,
        batch=data * fsdp,
    )
    stats: Any = setup.compiled().memory_analysis()
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Bytes(arguments=stats.argument_size_in_bytes, work=stats.temp_size_in_bytes + made)


def extrapolated(found: dict[tuple[int, int], Bytes], full: tuple[int, int] = FULL) -> Bytes:
    """From `DEPTHS` to the full depth: a base, and so much for each block of a kind."""

    def line(part: str) -> float:
        one, more_double, more_single = (getattr(found[depth], part) for depth in DEPTHS)
        double, single = more_double - one, more_single - one
        return one + (full[0] - 1) * double + (full[1] - 1) * single

    return Bytes(arguments=line("arguments"), work=line("work"))


def activation_bytes(config: FluxConfig, step: paper.Step) -> float:
    """Of a training step whose blocks are recomputed: every block's input, and one block's work."""
    blocks = config.depth + config.depth_single_blocks
    inputs = 2.0 * blocks * step.batch * step.tokens * config.hidden_size
    return inputs + 3.0 * sum(paper.activation_bytes(config, step).values())


def main(
    tokens: Annotated[int, typer.Option(help="Image tokens compiled, a square number.")] = 64,
    text: Annotated[int, typer.Option(help="Text tokens compiled.")] = 64,
    width: Annotated[int, typer.Option(help="Of the model; 3072 for FLUX.1-dev.")] = 3072,
    mesh: Annotated[
        list[str] | None, typer.Option(help=f"Only this row; may be repeated: {'; '.join(MESHES)}.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Plan every mesh and write the figures."""
    if math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"--tokens must be a square number, got {tokens}")
    if unknown := [name for name in mesh or () if name not in MESHES]:
        raise UserError(f"--mesh: expected one of {'; '.join(MESHES)}, got {unknown[0]}")
    # Before anything imports JAX.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Ordered to save memory, as on a GPU, where a CPU's default is to keep many operations ready.
    # And what nobody will run needs no optimised machine code; memory is laid out before that.
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} "
        "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    figures: dict[str, Figure] = {}
    for name in mesh or MESHES:
        found = {
            depth: planned(*depth, MESHES[name], tokens=tokens, text=text, width=width)
            for depth in DEPTHS
        }
        whole, activations = extrapolated(found), activation_bytes(FluxConfig.dev(), paper.Step())
        peak = whole.arguments + whole.work + activations
        planned_note = "extrapolated from 1 and 2 blocks of each kind, at full width"
        for measure, value, note in (
            ("held", whole.arguments, planned_note),
            ("weights", whole.work, planned_note),
            ("activations", activations, "on paper, of one state"),
            ("peak", peak, "the sum"),
        ):
            figures[f"{name}/{measure}"] = Figure(value=value / GIB, unit="GiB", note=note)
        print(f"{name}: {peak / GIB:.1f} GiB", flush=True)
        # Row by row: a plan takes minutes.
        result = Result(benchmark="scaling_plan", device="simulated CPU devices", figures=figures)
        print(f"written: {result.write(out).name}", flush=True)


if __name__ == "__main__":
    run(main)
