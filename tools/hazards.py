"""Looks for registers that a running tensor-core product may still read when they are written.

    pip install -e ".[cuda13]" nvidia-cuda-nvdisasm      # no GPU is needed
    python -m tools.hazards                              # exit code 1 if there is one

`wgmma` with its operand A in registers reads them after it has been issued, and PTX leaves it to
the program that they are not written before a wait. Where that is missing, results are right or
wrong with the timing, and neither ptxas nor compute-sanitizer say a word. So this compiles every
Mosaic tile of the H200's table and of the rules for int8, with and without a low-rank branch, and
follows its machine code (SASS) around each loop.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

# Rounds of a loop that are followed: products of one round run into the next.
_ROUNDS = 3
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z].*?)\s*;?\s*$")
_BRANCH = re.compile(r"BRA `\((\.L_x_\d+)\)")
_OPERAND_A = re.compile(r"[HI]GMMA\.\S+ R\d+, R(\d+),")
# Registers of operand A: 64 rows by 32 bytes of inputs, over 128 threads.
_OPERAND_REGISTERS = 4
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_WRITTEN = re.compile(r"(\S+) R(\d+),")
# Their first register is read.
_READERS = ("ST", "RED", "SYNCS", "UTMA", "R2UR")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of the machine code.

    Attributes:
      address: hexadecimal.
      text: without its predicate.
    """

    address: str
    text: str


def hazards(sass: str) -> list[Instruction]:
    """Instructions that write what a running product may still read, in the innermost loops.

    Args:
      sass: as `nvdisasm` prints it, of one kernel.
    """
    code, labels = _parse(sass)
    found: dict[Instruction, None] = {}
    for start, end in _inner_loops(code, labels):
        found |= dict.fromkeys(_follow(code[start : end + 1] * _ROUNDS))
    return list(found)


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(code)
        elif instruction:
            code.append(Instruction(instruction[1], instruction[2]))
    return code, labels


def _inner_loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of loops that multiply and have no such loop in them."""
    loops: list[tuple[int, int]] = []
    for end, one in enumerate(code):
        branch = _BRANCH.search(one.text)
        start = labels.get(branch[1], len(code)) if branch else len(code)
        if any("GMMA" in inner.text for inner in code[start : end + 1]):
            loops.append((start, end))
    return [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]


def _follow(code: list[Instruction]) -> Iterator[Instruction]:
    running: list[set[int]] = []
    begun: set[int] = set()
    for one in code:
        operand, wait = _OPERAND_A.match(one.text), _WAIT.match(one.text)
        written = _WRITTEN.match(one.text)
        if "GMMA" in one.text:
            if operand:
                first = int(operand[1])
                begun |= set(range(first, first + _OPERAND_REGISTERS))
            if "gsb0" in one.text:
                running, begun = [*running, begun], set()
        elif wait:
            running = running[max(0, len(running) - int(wait[1], 16)) :]
        elif written and not written[1].startswith(_READERS):
            first = int(written[2])
            registers = set(range(first, first + _width(written[1])))
            if registers & begun.union(*running):
                yield one


def _width(name: str) -> int:
    """Registers that an instruction writes."""
    if ".128" in name or ("LDSM" in name and name.endswith(".4")):
        return 4
    return 2 if ".64" in name or ".WIDE" in name or name.endswith(".2") else 1


def compiled_tiles(folder: Path) -> Iterator[tuple[str, str]]:
    """(what it is of, SASS) of kernels for many and few rows: the H200's table's and the rules'.

    Args:
      folder: where the compiler leaves it.

    Raises:
      UserError: JAX's CUDA plugin is not installed.
      RuntimeError: no disassembler was found.
    """
    # Read when JAX's CUDA plugin is loaded.
    os.environ |= {"MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from benchmarks import compile_only
    from pallas_kernels import tile_table
    from pallas_kernels.tile_table import Device
    from pallas_kernels.tiles import INT8_TILES, FewTile, Problem, Tile, few_tile

    device = Device(kind="NVIDIA H200", multiprocessors=132)
    card = compile_only.gpus(1)[0]
    tiles: dict[tuple[Tile | FewTile, int, bool], None] = {}
    for entry in tile_table.read_entries(tile_table.file_of(device.kind)):
        if isinstance(entry.tile, Tile | FewTile):
            tiles[entry.tile, entry.problem.activation_bits, entry.problem.grouped] = None
    tiles |= {(tile, 8, False): None for tile, _ in INT8_TILES}
    for bits in (8, 16):
        tiles[few_tile(Problem(m=40, n=4000, k=1024, activation_bits=bits)), bits, False] = None
    for (tile, bits, grouped), rank in [(key, rank) for key in tiles for rank in (0, 64)]:
        if rank and isinstance(tile, FewTile):
            continue
        _compile(tile, bits, grouped, rank, device, card)
        dumps = list(folder.glob("*.sass*"))
        if not dumps:
            raise RuntimeError("no machine code: expected nvdisasm, of nvidia-cuda-nvdisasm")
        scales = " a scale a group" * grouped
        for dump in dumps:
            text = dump.read_text(encoding="utf-8")
            if "GMMA" in text:
                yield f"A{bits}{scales}{f' rank {rank}' if rank else ''} {tile}", text
        for left in folder.iterdir():
            left.unlink()


def _compile(tile: Any, bits: int, grouped: bool, rank: int, device: Any, card: Any) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import mosaic
    from pallas_kernels.operands import Operands
    from pallas_kernels.packing import GROUP
    from pallas_kernels.tiles import FewTile

    m, n, k = 40 if isinstance(tile, FewTile) else 2500, 4000, 1024
    shapes = {
        "scale": ((n, k // GROUP) if grouped else (n,), jnp.float16),
        "bias": ((n,), jnp.bfloat16),
    }
    if rank:
        shapes |= {"u": ((m, rank), jnp.bfloat16), "v": ((n, rank), jnp.bfloat16)}
    place = SingleDeviceSharding(card)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    operands = Operands(**{name: array(*shape) for name, shape in shapes.items()})
    arguments = array((m, k), jnp.bfloat16), array((n, k // 4), jnp.uint8), operands

    def product(*arguments: Any) -> Any:
        return mosaic.ternary_matmul(
            *arguments, activation_bits=bits, out_dtype="bfloat16", device=device, tile=tile
        )

    jax.jit(product).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def main() -> None:
    """Prints every tile with how many hazards it has."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, sass in compiled_tiles(Path(folder)):
            found = hazards(sass)
            wrong += bool(found)
            print(f"{len(found)} hazards  {name}", flush=True)
            for hazard in found[:3]:
                print(f"    /*{hazard.address}*/ {hazard.text}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
