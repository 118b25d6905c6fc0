"""The whole pipeline in diffusers (PyTorch), bf16, all of it on the device: peak memory and time.

Random weights at FLUX.1-dev's shapes, T5-XXL, CLIP-L and the autoencoder included, made on the
device. Needs torch, diffusers and transformers, nothing of JAX. Run by `benchmarks.full_size`;
alone:

    python -m benchmarks.peers.diffusers_pipeline --output peer.json
"""

from __future__ import annotations

import importlib
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import run
from benchmarks.machine import package_versions
from benchmarks.peers.diffusers_step import SIZES as TRANSFORMERS

# By size: T5, CLIP and autoencoder as their classes take them; pixels of a side; steps.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "t5": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
        },
        "clip": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "pixels": 1024,
        "steps": 28,
        "tokens": 512,
    },
    "tiny": {
        "t5": {
            "vocab_size": 512,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 320,
            "num_layers": 1,
            "num_heads": 4,
        },
        "clip": {
            "vocab_size": 768,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        "pixels": 64,
        "steps": 2,
        "tokens": 48,
    },
}


def make_pipeline(size: str, device: Any) -> Any:
    """diffusers' FluxPipeline with random bf16 weights on a device, without tokenizers."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    diffusers: Any = importlib.import_module("diffusers")
    sizes = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    vae: dict[str, Any] = dict(sizes["vae"])
    levels = len(vae["block_out_channels"])
    vae |= {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    # On the device from the start: 17 B random numbers take long on a CPU.
    with torch.device(device):
        parts: dict[str, Any] = {
            "transformer": diffusers.FluxTransformer2DModel(**TRANSFORMERS[size][0]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes["clip"])),
            "text_encoder_2": T5EncoderModel(
                T5Config(**sizes["t5"], feed_forward_proj="gated-gelu")
            ),
            "vae": diffusers.AutoencoderKL(
                **vae,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }
    torch.set_default_dtype(torch.float32)
    for part in parts.values():
        part.eval().requires_grad_(False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler=scheduler, tokenizer=None, tokenizer_2=None, **parts)


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    size: Annotated[str, typer.Option(help="full or tiny.")] = "full",
) -> None:
    """Encodes, denoises and decodes twice; the peak is of all of it."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    sizes = SIZES[size]
    start = time.perf_counter()
    pipe = make_pipeline(size, device)
    made = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    lengths = {"clip": 77, "t5": sizes["tokens"]}

    def draw() -> Any:
        ids = {
            name: torch.randint(0, sizes[name]["vocab_size"], (1, length), device=device)
            for name, length in lengths.items()
        }
        with torch.inference_mode():
            pooled = pipe.text_encoder(ids["clip"]).pooler_output
            states = pipe.text_encoder_2(ids["t5"])[0]
            return pipe(
                prompt_embeds=states,
                pooled_prompt_embeds=pooled,
                height=sizes["pixels"],
                width=sizes["pixels"],
                num_inference_steps=sizes["steps"],
                output_type="pt",
            ).images

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    draw()
    start = time.perf_counter()
    images = draw()
    if gpu:
        torch.cuda.synchronize()
    figures: dict[str, Any] = {"make_s": made, "draw_s": time.perf_counter() - start}
    if not math.isfinite(float(images.float().sum())):
        raise RuntimeError("diffusers' picture is not finite: its time would mean nothing")
    if gpu:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(f"  diffusers, whole pipeline: {figures['draw_s']:.2f} s a picture", flush=True)
    versions = package_versions("torch", "diffusers", "transformers")
    output.write_text(json.dumps({"versions": versions, "figures": figures}), encoding="utf-8")


if __name__ == "__main__":
    run(main)
