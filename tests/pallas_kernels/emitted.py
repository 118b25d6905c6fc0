"""What the kernels' own code emits in MLIR, run in NumPy: nothing takes that code's place.

A value is an array (many, elements): of as many threads as are tried at once, a register.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.interpreters import mlir
from jaxlib.mlir.dialects import func

ir = mlir.ir

DTYPES = {"i8": np.uint8, "i16": np.uint16, "i32": np.uint32, "bf16": ml_dtypes.bfloat16}


def _shift(shifted):
    def run(word, by):
        assert np.all(by < 32), "MLIR does not say what this is"
        return shifted(word, by)

    return run


def _subtract_pairs(a, b):
    """Each word of two bfloat16."""
    a, b = (word.view(ml_dtypes.bfloat16) for word in (a, b))
    return (a - b).view(np.uint32)


ARITHMETIC = {
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.subi": np.subtract,
    "arith.shli": _shift(np.left_shift),
    "arith.shrui": _shift(np.right_shift),
}
ASSEMBLY = {("sub.rn.bf16x2 $0, $1, $2;", "=r,r,r"): _subtract_pairs}


class _Step(NamedTuple):
    """An instruction: what it computes, of which values, and how many elements of what that is."""

    run: Callable[..., Any]
    operands: list[int]
    size: int
    dtype: Any


class Emitted:
    """A function that emits instructions, as a function of arrays.

    Args:
      emit: takes MLIR values, and gives a list of them.
      kinds: their types, as MLIR writes them.
    """

    def __init__(self, emit, kinds):
        with mlir.make_ir_context(), ir.Location.unknown():
            module = ir.Module.create()
            with ir.InsertionPoint(module.body):
                function = func.FuncOp("emitted", ([ir.Type.parse(kind) for kind in kinds], []))
            block = function.add_entry_block()
            with ir.InsertionPoint(block):
                results = emit(*block.arguments)
                func.ReturnOp([])
            module.operation.verify()
            at = {value: index for index, value in enumerate(block.arguments)}
            self.steps = []
            for op in list(block.operations)[:-1]:
                self.steps.append(_step(op, [at[value] for value in op.operands]))
                at[op.result] = len(at)
            self.results = [at[value] for value in results]

    def __call__(self, *arrays):
        values = list(arrays)
        for step in self.steps:
            value = step.run(*(values[index] for index in step.operands))
            assert (value.shape[1], value.dtype) == (step.size, step.dtype)
            values.append(value)
        return [values[index] for index in self.results]


def _step(op, operands):
    kind, attributes = op.result.type, op.attributes
    size, element = 1, kind
    if isinstance(kind, ir.VectorType):
        [size], element = kind.shape, kind.element_type
    dtype = np.dtype(DTYPES[str(element)])
    match op.operation.name:
        case "arith.constant":
            value = ir.IntegerAttr(attributes["value"]).value % 2**32
            run = functools.partial(np.full, (1, 1), value, dtype)
        case "llvm.inline_asm":
            text = ir.StringAttr(attributes["asm_string"]).value
            run = ASSEMBLY[text, ir.StringAttr(attributes["constraints"]).value]
        case "arith.extui":
            run = functools.partial(np.asarray, dtype=dtype)
        case "vector.bitcast":
            run = functools.partial(np.ndarray.view, dtype=dtype)
        case "vector.broadcast" | "vector.extract":
            # Of one element, see `_Step.size`.
            run = np.asarray
        case name:
            run = ARITHMETIC[name]
    return _Step(run, operands, size, dtype)


@functools.cache
def _compiled(emit, settings):
    return Emitted(lambda word: [emit(word, *settings)], ["i32"])


def on_words(emit):
    """A function that emits what becomes of a 32-bit word, as one of an array of them."""

    def run(words, *settings):
        return _compiled(emit, settings)(words[:, None])[0][:, 0]

    return run
