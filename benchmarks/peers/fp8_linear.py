"""A PyTorch linear in float8 (e4m3), scaled by row, on `torch._scaled_mm`."""

from __future__ import annotations

from typing import Any

import torch

LARGEST = torch.finfo(torch.float8_e4m3fn).max
# The scale of a row of zeros.
_SMALLEST = 1e-12


def quantize_rows(x: Any) -> tuple[Any, Any]:
    """(M, K) to float8 and its scales (M, 1) float32, so that x is about their product."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=_SMALLEST) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


class Fp8Linear(torch.nn.Module):
    """`torch.nn.Linear` with a scale for every output and, at run time, for every token."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: Any):
        super().__init__()
        weight, scale = quantize_rows(linear.weight.data)
        # Column-major, as the tensor cores take the second operand: (K, N) with strides (1, K).
        self.register_buffer("weight", weight.t())
        self.register_buffer("scale", scale.t().contiguous())
        bias = None if linear.bias is None else linear.bias.data.to(torch.bfloat16)
        self.register_buffer("bias", bias)

    def forward(self, x: Any) -> Any:
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows,
            self.weight,
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])


def to_fp8(model: Any) -> int:
    """Put the linears of a diffusers FLUX transformer's blocks into float8; their number.

    The modulation's stay: they have one row, and the usual recipes leave them out too.
    """
    count = 0
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for name, child in list(blocks.named_modules()):
            if isinstance(child, torch.nn.Linear) and "norm" not in name:
                parent, _, last = name.rpartition(".")
                owner = blocks.get_submodule(parent)
                # By way of _modules: an index of a list has no attribute to be set.
                owner._modules[last] = Fp8Linear(child)
                count += 1
    return count
