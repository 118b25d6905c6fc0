"""The Triton kernel compiled ahead of time, for GPUs that need not be here: what it takes of them.

Needs Triton, but neither a GPU nor jax-triton.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pallas_kernels.tiles import TritonTile
from pallas_kernels.triton_matmul import kernel

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
    """

    registers: int
    stack: int
    shared: int


def compile_for(
    capability: int, tile: TritonTile, *, activation_bits: int, grouped: bool, gates: int = 1
) -> Resources:
    """Compiles the kernel for bfloat16 results, with bias, GELU, gate and residual.

    Args:
      capability: such as 86 for compute capability 8.6.
      tile: how the product is cut up.
      activation_bits: 8 for int8, 16 for bfloat16 activations.
      grouped: for a scale per group.
      gates: how many runs of tokens have a gate of their own.

    Raises:
      ImportError: Triton is not installed.
    """
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    exact = activation_bits == 8
    constants = {
        "OUTPUTS": tile.outputs,
        "TOKENS": tile.tokens,
        "BAND": tile.band,
        "EXACT": exact,
        "HAS_BIAS": True,
        "GATES": gates,
        "HAS_RESIDUAL": True,
        "GROUPED": grouped,
        "GELU": True,
    }
    float32 = dict.fromkeys(("scale_ptr", "token_ptr"), "*fp32")
    bfloat16 = dict.fromkeys(("bias_ptr", "gate_ptr", "residual_ptr", "y_ptr"), "*bf16")
    integers = dict.fromkeys(("m", "n", "k", "width"), "i32")
    types = {"x_ptr": "*i8" if exact else "*bf16", "packed_ptr": "*u8", **float32, **bfloat16}
    # Bare: Triton cannot look through the shape checks that a test run puts around every function.
    function = triton.jit(inspect.unwrap(kernel().fn))
    names = function.arg_names
    signature = {name: {**types, **integers}.get(name, "constexpr") for name in names}
    # As at run time: what is a multiple of 16 is known to be, and m may be anything.
    whole = [("tt.divisibility", 16)]
    attributes = {
        (index,): [list(pair) for pair in whole]
        for index, name in enumerate(names)
        if name not in constants and name != "m"
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values, attributes)
    settings = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
    registers, stack = _usage(compiled.asm["cubin"], Path(str(triton.__file__)).parent)
    return Resources(registers=registers, stack=stack, shared=compiled.metadata.shared)


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
