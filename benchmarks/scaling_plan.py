"""Memory a device for distilling FLUX.1-dev on meshes of up to 512 devices, planned by XLA.

    python -m benchmarks.scaling_plan          # by the GPU compiler, for H200s; no GPU is needed
    python -m benchmarks.scaling_plan --cpu    # for simulated CPU devices; no plugin is needed

Nothing runs: the training step is compiled ahead, from shapes alone, and XLA says what a device
would hold. Compiled at full width with one and two blocks of each kind, and extrapolated to 19 and
38: blocks of a kind are alike, so what a second one adds, each further one adds.

- held: latent weights, moments, teacher and trajectories, between steps. Exact.
- work: what a step holds beside that: gathered weights, gradients, activations. For GPUs it is
  compiled at full length, with XLA's own attention in chunks where a GPU has cuDNN's. That keeps
  the probabilities of one block, but not every block's result, 1.5 GiB a state.

For simulated CPU devices, work is an estimate, and in two parts:

- weights: compiled with few tokens. A CPU computes bf16 products in float32, and gradients over
  two axes are summed whole on every device: there it is far too much.
- activations: on paper. XLA's CPU backend drops the barriers that keep a recomputed block in its
  place, recomputes all of them early, and has no fused attention. What must be there is what
  each block keeps (its input, gated products, attention), and in the gradient of one block three
  times what its forward pass holds at its widest: the values, their gradients, and both in float32
  on the way.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Annotated, Any

import typer

from benchmarks import compile_only, paper
from benchmarks.common import Figure, OutOrNone, Result, results_folder, run
from benchmarks.machine import GIB
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.tokenization import DEV_TOKENS

DEVICES = 512
WIDTH = 3072
# Of an image of 1024 x 1024.
TOKENS = 4096
DEPTHS = ((1, 1), (2, 1), (1, 2))
FULL = (19, 38)
# Name of a row: (data, fsdp, tensor).
MESHES = {
    "2 devices, fsdp 2": (1, 2, 1),
    "4 devices, fsdp 4": (1, 4, 1),
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
    depth: int,
    singles: int,
    axes: tuple[int, int, int],
    *,
    cpu: bool,
    tokens: int,
    text: int,
    width: int,
) -> Bytes:
    """Compile one step, for one state a device.

    Args:
      depth, singles: blocks of each kind.
      axes: data, fsdp, tensor.
      cpu: for simulated CPU devices; GPUs otherwise.
      tokens: image tokens, a square number.
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
    devices = None if cpu else compile_only.gpus(math.prod(axes))
    setup = Setup.of(
        flux,
        make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices),
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
    """A training step's activations, blocks recomputed: what each keeps, and one block's work.

    A block keeps its input, its gated products (two in a double block, one in a single) and, by
    cuDNN, its attention.
    """
    kept = 4 * config.depth + 3 * config.depth_single_blocks
    stream = 2.0 * step.batch * step.tokens * config.hidden_size
    return kept * stream + 3.0 * sum(paper.activation_bytes(config, step).values())


def plan_gpus(name: str, width: int) -> dict[str, Figure]:
    """A mesh of GPUs: what the compiler plans at full length."""
    whole = _extrapolate(name, cpu=False, tokens=TOKENS, text=DEV_TOKENS, width=width)
    parts = {"held": whole.arguments, "work": whole.work, "peak": whole.arguments + whole.work}
    notes = {"peak": "the sum"}
    return {
        part: Figure(value=value / GIB, unit="GiB", note=notes.get(part, _EXTRAPOLATED))
        for part, value in parts.items()
    }


def plan_cpus(name: str, width: int) -> dict[str, Figure]:
    """A mesh of simulated CPU devices: compiled with few tokens, activations on paper."""
    whole = _extrapolate(name, cpu=True, tokens=64, text=64, width=width)
    activations = activation_bytes(FluxConfig.dev(), paper.Step())
    parts = {
        "held": (whole.arguments, _EXTRAPOLATED),
        "weights": (whole.work, _EXTRAPOLATED),
        "activations": (activations, "on paper, of one state"),
        "peak": (whole.arguments + whole.work + activations, "the sum"),
    }
    return {
        part: Figure(value=value / GIB, unit="GiB", note=note)
        for part, (value, note) in parts.items()
    }


_EXTRAPOLATED = "extrapolated from 1 and 2 blocks of each kind, at full width"


def _extrapolate(name: str, **settings: Any) -> Bytes:
    return extrapolated({depth: planned(*depth, MESHES[name], **settings) for depth in DEPTHS})


def main(
    cpu: Annotated[bool, typer.Option("--cpu", help="For simulated CPU devices.")] = False,
    width: Annotated[int, typer.Option(help="Of the model; 3072 for FLUX.1-dev.")] = WIDTH,
    mesh: Annotated[
        list[str] | None, typer.Option(help=f"Only this row; may be repeated: {'; '.join(MESHES)}.")
    ] = None,
    out: OutOrNone = None,
) -> None:
    """Plan every mesh and write the figures."""
    if unknown := [name for name in mesh or () if name not in MESHES]:
        raise UserError(f"--mesh: expected one of {'; '.join(MESHES)}, got {unknown[0]}")
    if width % 128 or width < 128:
        raise UserError(f"--width must be a multiple of 128, got {width}")
    if not cpu:
        compile_only.check_plugin()
    folder = results_folder(out, {"--width": width != WIDTH, "--mesh": bool(mesh)})
    # Before anything imports JAX. What nobody will run needs no optimised machine code, and no
    # timing of kernels; memory is laid out before that.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        (
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_gpu_autotune_level=0",
            f"--xla_force_host_platform_device_count={DEVICES if cpu else 1}",
            # Ordered to save memory, as on a GPU, where a CPU's default is to keep many operations
            # ready.
            "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        )
    )
    kind = "cpu" if cpu else "gpu"
    device = "simulated CPU devices" if cpu else "compile-only NVIDIA H200"
    figures: dict[str, Figure] = {}
    for name in mesh or MESHES:
        found = plan_cpus(name, width) if cpu else plan_gpus(name, width)
        figures |= {f"{name}/{part}": figure for part, figure in found.items()}
        print(f"{name}: {found['peak'].value:.1f} GiB", flush=True)
        if folder is not None:
            # Row by row: a plan takes minutes.
            result = Result(benchmark=f"scaling_plan_{kind}", device=device, figures=figures)
            print(f"written: {result.write(folder).name}", flush=True)


if __name__ == "__main__":
    run(main)
