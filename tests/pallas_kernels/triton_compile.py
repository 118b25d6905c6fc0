"""The Triton kernels compiled ahead of time, for GPUs that need not be here: what it takes of them.

Needs Triton, but neither a GPU nor jax-triton.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.packing import BLOCK_BYTES, packed_width
from pallas_kernels.tiles import Problem, TritonTile
from pallas_kernels.triton_matmul import settings

# Bytes of shared memory that a block can have, by compute capability (CUDA C++ programming guide,
# technical specifications).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one block of threads takes.

    Attributes:
      registers: of a thread.
      stack: bytes of a thread; more than 0 means that registers are spilled to memory.
      shared: bytes of shared memory.
      ptx: the program.
    """

    registers: int
    stack: int
    shared: int
    ptx: str = dataclasses.field(repr=False)


def compile_for(
    capability: int, tile: TritonTile, problem: Problem, *, gates: int = 1, rank: int = 0
) -> Resources:
    """Compiles a kernel for bfloat16 results, with bias, GELU, gate and residual.

    Args:
      capability: such as 86 for compute capability 8.6.
      tile: how the product is cut up.
      problem: whose activations are bfloat16 if they have 16 bits.
      gates: how many runs of tokens have a gate of their own.
      rank: of a low-rank branch.

    Raises:
      ImportError: Triton is not installed.
    """
    from pallas_kernels import triton_kernels

    exact = problem.activation_bits == 8
    constants = settings(
        tile,
        n=problem.n,
        width=packed_width(problem.k),
        exact=exact,
        codes=exact and not problem.grouped,
        grouped=problem.grouped,
        bias=True,
        rank=rank,
        gelu=True,
        gates=gates,
        residual=True,
    )
    # As jax-triton has it: an integer that is 1 is a constant.
    integers = {"m": problem.m, "blocks": packed_width(problem.k) // BLOCK_BYTES}
    constants |= {name: value for name, value in integers.items() if value == 1}
    float32 = dict.fromkeys(("scale_ptr", "token_ptr"), "*fp32")
    bfloat16 = dict.fromkeys(
        ("bias_ptr", "gate_ptr", "residual_ptr", "u_ptr", "v_ptr", "y_ptr"), "*bf16"
    )
    types = {"x_ptr": "*i8" if exact else "*bf16", "packed_ptr": "*u8", "sum_ptr": "*i32"}
    types |= {**float32, **bfloat16, **{n: "i32" for n in integers if n not in constants}}
    function = triton_kernels.multiply_few if tile.split else triton_kernels.multiply_many
    return _compile(function, capability, types, constants, tile.warps, tile.stages)


def compile_heads(
    capability: int, lengths: tuple[int, ...], heads: int, width: int, *, groups: int | None = None
) -> Resources:
    """Compiles a kernel of `triton_heads`, for bfloat16.

    Args:
      capability: as for `compile_for`.
      lengths: tokens of the one or two sequences; the last has wider rows, as FLUX's single blocks.
      heads, width: as for `triton_heads.settings`.
      groups: of heads that are written together; None for q, k and v apart.
    """
    from pallas_kernels import triton_heads, triton_heads_kernel

    qkv = 3 * heads * width
    strides = [qkv] * (len(lengths) - 1) + [qkv + 4 * heads * width]
    group = heads // (groups or 1)
    constants = triton_heads.settings(strides, heads=heads, group=group, width=width, eps=1e-6)
    function = triton_heads_kernel.normalize_and_rotate
    if groups is not None:
        function = triton_heads_kernel.normalize_and_rotate_grouped
    types = {name: "*bf16" for name in function.arg_names if name.endswith("_ptr")}
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "first_length": "i32", "length": "i32"}
    return _compile(function, capability, types, constants, triton_heads.WARPS, 1)


def _compile(
    function: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
) -> Resources:
    """One kernel, from the types of what is no constant."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # As jax-triton has it: arrays begin at a multiple of 16 bytes, and integers may be anything.
    whole = [("tt.divisibility", 16)]
    attributes = {
        (index,): [list(pair) for pair in whole]
        for index, name in enumerate(names)
        if name.endswith("_ptr")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"], Path(str(triton.__file__)).parent)
    return Resources(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
    )


def _usage(cubin: Any, triton_folder: Path) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, from the tool that Triton brings."""
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise ValueError(f"cuobjdump: expected REG: and STACK:, got {done.stdout[:200]!r}")
    return int(found[1]), int(found[2])
