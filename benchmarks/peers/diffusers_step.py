"""The same step in diffusers (PyTorch): eager, with its blocks compiled, and those in float8.

Needs torch and diffusers, nothing of JAX. Run by `benchmarks.transformer_step --peers` and
`benchmarks.full_size`; alone:

    python -m benchmarks.peers.diffusers_step --output peer.json --fp8
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import QUEUED_STEPS, median_seconds, run
from benchmarks.machine import package_versions

INPUT_SETS = 4

# The constructor's arguments for FLUX.1-dev and for the shipped model, and (image, text) tokens.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "full": (
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        4096,
        512,
    ),
    "tiny": (
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 3,
            "num_single_layers": 6,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 128,
            "guidance_embeds": True,
            "axes_dims_rope": (8, 12, 12),
        },
        64,
        48,
    ),
}


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    size: Annotated[str, typer.Option(help="full or tiny.")] = "full",
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 20,
    compiled: Annotated[bool, typer.Option(help="Also with compiled blocks.")] = True,
    fp8: Annotated[
        bool, typer.Option(help="Last, with linears in float8, scaled by row (torch._scaled_mm).")
    ] = False,
) -> None:
    """Times diffusers' FluxTransformer2DModel with random bf16 weights."""
    import torch
    from diffusers import FluxTransformer2DModel  # pyright: ignore[reportPrivateImportUsage]

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    arguments, image_tokens, text_tokens = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    # On the device from the start: 12 B random numbers take long on a CPU.
    with torch.device(device):
        model = FluxTransformer2DModel(**arguments).eval().requires_grad_(False)
        sets = _inputs(arguments, image_tokens, text_tokens)
    torch.set_default_dtype(torch.float32)

    def step(inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return model(**inputs, return_dict=False)[0]

    def wait(_: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    def measure(name: str) -> dict[str, Any]:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        wait(step(sets[0]))
        first = time.perf_counter() - start
        rows = [(one,) for one in sets]
        waited, seconds = (
            median_seconds(step, rows, wait=wait, repeats=repeats, calls=calls)
            for calls in (1, QUEUED_STEPS)
        )
        if not torch.isfinite(step(sets[0])).all():
            raise RuntimeError(f"diffusers, {name}: the output is not finite")
        figures = {"step_ms": 1e3 * seconds, "waited_ms": 1e3 * waited, "first_step_s": first}
        if gpu:
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        times = f"{1e3 * seconds:.2f} ms a step, {1e3 * waited:.2f} waited for"
        print(f"  diffusers, {name}: {times}", flush=True)
        return figures

    modes = {"eager": measure("eager")}
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
        modes["compiled blocks"] = measure("compiled blocks")
    if fp8:
        from benchmarks.peers.fp8_linear import to_fp8

        print(f"  {to_fp8(model)} linears in float8", flush=True)
        if compiled:
            # The blocks have other layers now: what was compiled is of no use.
            torch.compiler.reset()
            model.compile_repeated_blocks(fullgraph=True)
        if gpu:
            torch.cuda.empty_cache()
        modes["fp8, compiled blocks" if compiled else "fp8, eager"] = measure("fp8")
    versions = package_versions("torch", "diffusers")
    output.write_text(json.dumps({"versions": versions, "modes": modes}), encoding="utf-8")


def _inputs(arguments: dict[str, Any], image_tokens: int, text_tokens: int) -> list[dict[str, Any]]:
    import torch

    side = int(image_tokens**0.5)
    ids = torch.zeros(side, image_tokens // side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(image_tokens // side)[None, :]
    return [
        {
            "hidden_states": torch.randn(1, image_tokens, arguments["in_channels"]),
            "encoder_hidden_states": torch.randn(1, text_tokens, arguments["joint_attention_dim"]),
            "pooled_projections": torch.randn(1, arguments["pooled_projection_dim"]),
            "timestep": torch.tensor([1.0 - index / INPUT_SETS]),
            "guidance": torch.full((1,), 3.5, dtype=torch.float32),
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(text_tokens, 3),
        }
        for index in range(INPUT_SETS)
    ]


if __name__ == "__main__":
    run(main)
