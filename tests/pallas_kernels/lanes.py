"""A warp in NumPy: 32 lanes, each value an array of theirs, and the instructions that are emitted.

The classes take the place of the kernel's own emitters; where those emit an instruction, these do
it at once.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from pallas_kernels.mosaic_mma import Multiplier
from pallas_kernels.mosaic_warp import _Warp

LANES = np.arange(32)
ROW, QUARTER = LANES // 4, LANES % 4


def words_of(values):
    """Each lane's last axis, as 32-bit words."""
    return np.ascontiguousarray(values).view(np.uint32)


def bytes_of(words, dtype):
    """(32, elements) of the words of each lane."""
    return np.stack(words, 1).view(dtype)


class Lanes(Multiplier):
    """`Multiplier` of numbers."""

    def __init__(self, shape):
        self.shape = shape
        self.i32 = self.sum_type = None
        self.arith = SimpleNamespace(
            addi=lambda a, b: a + b,
            addf=lambda a, b: a + b,
            subi=lambda a, b: a - b,
            shrsi=lambda a, b: a >> b.astype(np.int32),
        )

    def word(self, value):
        return np.full(32, value, np.uint32)

    def asm(self, results, operands, text, *, stays=False):
        name, choice = text.split()[0], int(text.rstrip(";").split(",")[-1], 16)
        assert name == "prmt.b32"
        pair = bytes_of(operands, np.uint8)
        chosen = [pair[:, choice >> 4 * i & 7] for i in range(4)]
        return [words_of(np.stack(chosen, 1))[:, 0]]

    def mma(self, a, b, sums):
        """ "mma.m16n8k32" and "mma.m16n8k16" of the PTX ISA: which lane has what."""
        exact = self.shape.exact
        left_type, right_type = (np.uint8, np.int8) if exact else (ml_dtypes.bfloat16,) * 2
        size = 4 if exact else 2
        left, right = np.zeros((16, 8 * size)), np.zeros((8 * size, 8))
        for register, word in enumerate(a):
            elements = bytes_of([word], left_type)
            for i in range(size):
                at = QUARTER * size + i + 4 * size * (register // 2)
                left[ROW + 8 * (register % 2), at] = elements[:, i]
        for register, word in enumerate(b):
            elements = bytes_of([word], right_type)
            for i in range(size):
                right[QUARTER * size + i + 4 * size * register, ROW] = elements[:, i]
        product = (left @ right).astype(np.int32 if exact else np.float32)
        return [
            sums[i] + product[ROW + 8 * (i // 2), 2 * QUARTER + i % 2] for i in range(len(sums))
        ]


class Memory:
    """Bytes that have addresses; what nobody has written is 0xA5."""

    def __init__(self, size):
        self.bytes = np.full(size, 0xA5, np.uint8)
        self.free = 16

    def place(self, array):
        """The address of a copy of it; nothing lies beside it."""
        flat = np.ascontiguousarray(array).view(np.uint8).ravel()
        start, self.free = self.free, self.free + -(-flat.size // 16) * 16 + 64
        self.bytes[start : start + flat.size] = flat
        return start

    def read(self, addresses, count):
        """(32, count) bytes."""
        assert not np.any(addresses % count), "not aligned"
        return self.bytes[addresses.astype(np.int64)[:, None] + np.arange(count)]

    def write(self, addresses, values):
        values = np.ascontiguousarray(values).view(np.uint8).reshape(32, -1)
        self.bytes[addresses.astype(np.int64)[:, None] + np.arange(values.shape[1])] = values


class _Numbers(Lanes):
    """What `_Warp` emits, done at once."""

    def __init__(self, shape):
        super().__init__(shape)
        self.groups, self.copies = [], []
        self.i64 = None
        self.utils = SimpleNamespace(
            c=lambda value, kind: np.full(32, value),
            thread_idx=lambda: (LANES + 32 * self.index).astype(np.uint32),
            memref_ptr=lambda address: address,
            getelementptr=lambda start, at, kind: start + 4 * at[0].astype(np.int64),
        )
        self.llvm = SimpleNamespace(
            ptrtoint=lambda kind, address: np.full(32, address),
            store=lambda value, address: self.memory.write(address, self.stored(value)),
        )
        vars(self.arith).update(
            muli=lambda a, b: a * b,
            divui=lambda a, b: a // b,
            remui=lambda a, b: a % b,
            andi=lambda a, b: a & b,
            shrui=lambda a, b: a >> b,
            minui=np.minimum,
            extui=lambda kind, value: value.astype(np.int64),
            cmpi=lambda how, a, b: a < b,
            select=np.where,
            CmpIPredicate=SimpleNamespace(ult=None),
        )

    def stored(self, value):
        return value.astype(np.int32 if self.shape.exact else np.float32)

    def asm(self, results, operands, text, *, stays=False):
        if text.startswith("prmt."):
            return super().asm(results, operands, text)
        if text.startswith("barrier.sync 0;"):
            self.barrier.wait(60)
            return []
        if text.startswith("cp.async.commit_group"):
            self.groups.append(self.copies)
            self.copies = []
            return []
        if text.startswith("cp.async.wait_group"):
            # The latest may be under way still; then they have not come.
            while len(self.groups) > int(text.rstrip(";").split()[-1]):
                for target, data in self.groups.pop(0):
                    self.memory.write(target, data)
            return []
        if text.startswith("cp.async.cg.shared.global [$0], [$1], 16, $2;"):
            target, source, many = operands
            data = self.memory.read(source, 16)
            self.copies.append((target, np.where(np.arange(16) < many[:, None], data, 0)))
            return []
        kind, offset = re.fullmatch(r"ld\.(\S+)\.v4\.b32 .*, \[\$4 \+ (\d+)\];", text).groups()
        assert kind in ("shared", "global.nc")
        return list(words_of(self.memory.read(operands[0] + int(offset), 16)).T)


class Machine(_Warp, _Numbers):
    """A warp of a thread block.

    Args:
      shape: of the product.
      index: of the warp.
      memory: where everything is; what `run` takes are addresses.
      barrier: of all warps.
    """

    def __init__(self, shape, index, memory, barrier):
        self.index, self.memory, self.barrier = index, memory, barrier
        super().__init__(shape)

    def loop(self, trips, carried, body):
        for step in range(trips[0]):
            carried = body(self.word(step), carried)
        return carried


def run_block(shape, memory, *addresses):
    """All warps of a thread block, each in a thread of its own."""
    barrier = threading.Barrier(shape.warps)
    with ThreadPoolExecutor(shape.warps) as pool:
        machines = [Machine(shape, warp, memory, barrier) for warp in range(shape.warps)]
        runs = [pool.submit(machine.run, *addresses) for machine in machines]
        for run in runs:
            run.result()
