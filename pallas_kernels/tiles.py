"""Which tiles a product is cut into: what a tile is, and the rules for what no table has.

`tile_table` holds the measured ones. Nothing here imports Pallas or Triton.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.packing import BLOCK_BYTES, BLOCK_CODES

# What a decoded code is: the code itself (0, 1, 2; the sum of the activations is taken off later),
# the sign that it stands for, or that sign at the top of an operand (see `mosaic_decode`).
CODE, SIGN, TOP = "code", "sign", "top"

# When a lane of the kernel for the fewest rows reads its activations, see `DirectTile`.
AHEAD, LATE, SHARED = "ahead", "late", "shared"

# Columns of a low-rank branch that are multiplied at once.
LOW_RANK = 64

# What a block can have on Hopper, less a kilobyte for barriers and alignment.
SHARED_BYTES = 226 * 1024

# Up to here, reading the codes takes longer than multiplying by them; and up to here, a warp's
# activations fit into its registers.
FEW_ROWS, DIRECT_ROWS = 64, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What decides about the tile: y (m, n) from x (m, k).

    Attributes:
      m, n, k: tokens, outputs, inputs.
      activation_bits: 8 or 16.
      grouped: whether the weight has a scale per group.
    """

    m: int
    n: int
    k: int
    activation_bits: int
    grouped: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The tile of the Mosaic kernel for many rows.

    Two warpgroups share the tokens, and each has outputs of its own.

    Attributes:
      rows: outputs of one compute warpgroup; 64 or 128.
      tokens: of a tile; a multiple of 16 (int8) or 8, at most 256.
      planes: of activations in one stage: 1, 2 or 4 times 64 inputs.
      stages: of activations.
      code_stages: of packed codes, 256 inputs each.
      store: tokens that are written at once, of a 16-bit result; half as many of a 32-bit one.
      band: tiles that are worked through together, for the cache's sake.
      along_n: whether a band runs along the outputs; along the tokens otherwise.
      lag: 1 keeps the products of a stage running while the next stage is begun; 0 does not. With
        all four planes in a stage, `flight` must then be 3 or less.
      flight: how many of a stage's products may run at once; None for all.
      decode: `CODE`, `SIGN` or `TOP`. `CODE` needs int8 activations whose sums are known and a
        scale that is not per group; elsewhere it is `SIGN`.
    """

    rows: int = 128
    tokens: int = 128
    planes: int = 4
    stages: int = 4
    code_stages: int = 4
    store: int = 32
    band: int = 8
    along_n: bool = False
    lag: int = 0
    flight: int | None = None
    decode: str = CODE

    def __post_init__(self) -> None:
        # The tensor cores read operand A from registers after the instruction has been issued, and
        # a plane's are written again for the next 256 inputs: nothing but a wait in between keeps
        # the two apart. With `lag`, a stage's planes and those of the stage before may be running.
        running = 2 * self.planes - 1 if self.flight is None else self.flight
        if self.lag and running > 3:
            raise ValueError(
                "lag = 1 would decode into registers that running products still read: expected "
                f"1 or 2 planes, or flight of 3 or less, got {self}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTile:
    """The tile of the Mosaic kernel for a few rows.

    Attributes:
      tokens: of a tile; a power of two from 8 on.
      groups: warpgroups of a block, which share the inputs out among them.
      stages: of each, 256 inputs.
    """

    tokens: int
    groups: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectTile:
    """The tile of the Mosaic kernel for up to 16 rows, which are all in it.

    Attributes:
      groups: warpgroups of a block, whose warps share out the outputs and the inputs; at least one
        for every 64 outputs.
      rows: outputs of a warp; a multiple of 16.
      outputs: of a block; 64 or more, a multiple of `rows`. The warps have them as often as there
        are shares of the inputs: a whole number.
      stages: of a warp, 256 inputs.
      activations: `AHEAD`: those of the next 256 inputs are read into registers while these are
        multiplied, in 8 bits, or of up to 8 tokens; this takes the room of other blocks. `LATE`:
        when they are multiplied. `SHARED`: all are copied to shared memory first.
    """

    groups: int = 1
    rows: int = 32
    outputs: int = 64
    stages: int = 2
    activations: str = AHEAD

    def __post_init__(self) -> None:
        whole = self.outputs % self.rows == 0 == 4 * self.groups * self.rows % self.outputs
        if self.rows % 16 or not whole:
            raise ValueError(f"the warps cannot share out the outputs of a block: {self}")
        if not 64 <= self.outputs <= 64 * self.groups:
            raise ValueError(f"a block has 64 outputs or more, and a warpgroup for each 64: {self}")

    @property
    def shares(self) -> int:
        """How many warps share the inputs out."""
        return 4 * self.groups * self.rows // self.outputs

    @property
    def tokens(self) -> int:
        """A tile's tokens."""
        return DIRECT_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonTile:
    """The tile of the Triton kernels.

    Attributes:
      outputs, tokens: of a tile; powers of two from 16 and 8 on.
      band: tiles of tokens that are worked through together.
      warps, stages: Triton's own two.
      planes: of one product, 64 inputs each: 1, 2 or 4; at most 2 where scales are per group.
      passes: whether the inputs are gone through once for each `planes` of every block, which
        leaves one product in the loop and takes less shared memory, but reads the codes as often.
      split: whether the warps share out the inputs instead of the tile, for a few rows; nothing is
        made of band, planes and passes then.
    """

    outputs: int = 128
    tokens: int = 128
    band: int = 8
    warps: int = 8
    stages: int = 3
    planes: int = 1
    passes: bool = False
    split: bool = False


AnyTile = Tile | FewTile | DirectTile | TritonTile

# Tiles of int8 products, and their speed beside the first's while all multiprocessors have one: as
# measured with 12288 and 15360 inputs, where beginning and ending weigh little (one H200,
# 2026-11-29). Smaller ones decode more for each product, and leave less of the last wave empty.
INT8_TILES = (
    (Tile(), 1.0),
    (Tile(tokens=144, store=48, stages=3, code_stages=3, flight=1), 1.0),
    (Tile(tokens=112, store=16), 0.95),
    (Tile(tokens=96, lag=1, flight=2), 0.92),
    (Tile(rows=64), 0.93),
    (Tile(rows=64, tokens=64, stages=6), 0.6),
    (Tile(rows=64, tokens=32, stages=6), 0.38),
)


def mosaic_rule(
    problem: Problem, multiprocessors: int, *, run: int | None = None
) -> Tile | FewTile | DirectTile:
    """The Mosaic tile of a product that no table has.

    Args:
      problem: the product.
      multiprocessors: of the device.
      run: tokens that share a gate, where there are several gates. A tile has one: of tiles that
        do not go evenly into a run, XLA would have to gate the result. None: any.
    """
    if problem.m <= DIRECT_ROWS and not problem.grouped:
        # Activations of 8 tokens in 8 bits leave registers for more outputs of a warp.
        light = problem.activation_bits == 8 and problem.m <= 8
        return DirectTile(rows=64 if light else 32)
    if problem.m <= FEW_ROWS and not problem.grouped:
        return few_tile(problem)
    if problem.grouped:
        # Two sums per element are in registers: half a tile, and no register is spilled.
        tokens = 64 if problem.m <= 64 else 128
        planes = 4 if problem.activation_bits == 8 else 2
        return Tile(rows=64, tokens=tokens, planes=planes, decode=SIGN)
    if problem.activation_bits == 16:
        return Tile(planes=2, stages=4, decode=SIGN)

    def cost(size: tuple[Tile, float]) -> float:
        tile, speed = size
        tiles = -(-problem.m // tile.tokens) * -(-problem.n // (2 * tile.rows))
        return -(-tiles // max(multiprocessors, 1)) * tile.rows * tile.tokens / speed

    even = [size for size in INT8_TILES if run is None or run % size[0].tokens == 0]
    tile, _ = min(even or INT8_TILES, key=cost)
    along_n = -(-problem.n // (2 * tile.rows)) > -(-problem.m // tile.tokens)
    return dataclasses.replace(tile, along_n=along_n)


def few_tile(problem: Problem) -> FewTile:
    """The tile of the kernel for up to 64 rows."""
    tokens = max(8, _power(problem.m))
    # Within shared memory.
    return FewTile(tokens=tokens, groups=4 if tokens * problem.activation_bits <= 512 else 2)


def triton_rule(problem: Problem) -> TritonTile:
    """The Triton tile of a product that no table has. It fits the 99 KiB that Ada has."""
    wide = problem.activation_bits == 16
    if problem.m <= 16:
        # Small tiles, so that many programs read at once; a tile of more tokens has more to read.
        outputs = 16 if problem.m <= 8 else 32
        return TritonTile(outputs=outputs, tokens=max(8, _power(problem.m)), warps=4, split=True)
    if problem.m <= FEW_ROWS:
        return TritonTile(outputs=64, tokens=_power(problem.m), warps=4, stages=2 if wide else 3)
    if problem.grouped:
        # Two sums per element are in registers.
        return TritonTile(tokens=64, stages=2 if wide else 3)
    return TritonTile(planes=2, passes=True)


def shared_bytes(tile: Tile | FewTile | DirectTile, problem: Problem) -> int:
    """Shared memory of a Mosaic block with a 16-bit result, but for its barriers.

    Args:
      tile: how the product is cut up.
      problem: the product.
    """
    size = problem.activation_bits // 8
    plane = BLOCK_BYTES * size
    if isinstance(tile, DirectTile):
        codes = 4 * tile.groups * tile.stages * tile.rows * BLOCK_BYTES
        sums = tile.shares * tile.outputs * whole_tokens(problem.m) * 4
        shared = tile.activations == SHARED
        return codes + sums + shared * problem.m * shared_row(problem.k, size)
    if isinstance(tile, FewTile):
        stage = tile.tokens * 4 * plane + 64 * BLOCK_BYTES
        sums, result = 64 * tile.tokens * 4, 64 * tile.tokens * 2
        return tile.groups * tile.stages * stage + (tile.groups - 1) * sums + result
    activations = tile.stages * tile.tokens * tile.planes * plane
    codes = tile.code_stages * 2 * tile.rows * BLOCK_BYTES
    return activations + codes + 2 * 2 * tile.store * tile.rows * 2


def whole_tokens(tokens: int) -> int:
    """`tokens`, rounded up to the 8 that an instruction of the fewest rows' kernel takes."""
    return 8 * -(-tokens // 8)


def shared_row(inputs: int, size: int) -> int:
    """Bytes from one token's activations to the next one's, where a block shares them.

    Neighbouring rows are read together, and so that they come from different banks: of each 128
    bytes, int8's quarters of a warp read half, and those of 16 bits every second 16 bytes.

    Args:
      inputs: of the product.
      size: bytes of an activation.
    """
    return size * BLOCK_CODES * -(-inputs // BLOCK_CODES) + (64 if size == 1 else 16)


def low_rank_rows(tile: Tile, activation_bits: int) -> int:
    """Rows of `LOW_RANK` columns in 16 bits that fill a stage of activations."""
    activations = tile.tokens * tile.planes * BLOCK_BYTES * activation_bits
    return activations // (LOW_RANK * 16)


def low_rank_stages(tile: Tile, activation_bits: int) -> int:
    """Stages that `LOW_RANK` columns of a low-rank branch pass through; 0 if they find no room.

    One is of the tile's tokens. Its outputs' are another, or one for each of the two warpgroups.
    """
    rows = low_rank_rows(tile, activation_bits)
    if rows < max(tile.tokens, tile.rows):
        return 0
    stages = 2 if rows >= 2 * tile.rows else 3
    return stages if stages <= tile.stages else 0


def fit_store(tile: Tile, out_dtype: Any) -> int:
    """Tokens written at once for a result of `out_dtype`: the same bytes for each."""
    return tile.store if jnp.dtype(out_dtype).itemsize == 2 else tile.store // 2


def _power(m: int) -> int:
    """The least power of two that is not less than m."""
    return 1 << max(m - 1, 0).bit_length()
