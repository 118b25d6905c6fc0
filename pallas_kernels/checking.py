"""Proof of a backend: its results against exact integers and float64, on this machine.

A result must be within what its roundings explain: the sums are exact integers (or float32 sums of
16-bit products), what follows them is float32, and the last step rounds to the result's type.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.operands import Operands
from pallas_kernels.packing import GROUP, group_count, pack_codes
from pallas_kernels.tile_table import Device
from pallas_kernels.tiles import Tile

Arrays = dict[str, Any]

# Half a unit in the last place, relative.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
FLOAT32 = 2.0**-24
# How far float32 sums of 16-bit products may be from exact, of the sum of their magnitudes. The
# tensor cores drop bits where a library adds in pairs; both stay well below.
SUMMATION = 2.0**-20
# Exponential, sigmoid or tanh to a few units, in a function whose argument is rounded too.
GELU_ERROR = 2.0**-16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One product, with its options.

    Attributes:
      m, n, k: tokens, outputs, inputs.
      activation_bits: 8 or 16.
      granularity: of the weight's scale: tensor, channel or group.
      out_dtype: of the result.
      gelu, extras: whether there are GELU; and gate and residual.
      rank: of a low-rank branch; 0 for none.
      gates: how many runs of tokens have a gate of their own; m is a multiple.
      codes: "all", or the only code that the weight has.
      integers: x is int8, all scales are 1 and nothing follows: the sums themselves must come out.
      row_sum: whether the sums of such an x are given: a kernel may then decode codes, not signs.
    """

    m: int
    n: int
    k: int
    activation_bits: int = 8
    granularity: str = "channel"
    out_dtype: str = "bfloat16"
    gelu: bool = False
    extras: bool = False
    rank: int = 0
    gates: int = 1
    codes: str = "all"
    integers: bool = False
    row_sum: bool = True

    def __str__(self) -> str:
        bits = "int8 sums" if self.integers else f"A{self.activation_bits}"
        bits += "" if self.row_sum else " of signs"
        rank = f" rank {self.rank}" if self.rank else ""
        gates = f" {self.gates} gates" if self.gates > 1 else " gate"
        options = " gelu" * self.gelu + f"{gates} residual" * self.extras
        codes = "" if self.codes == "all" else f" codes {self.codes}"
        shape = f"{self.m}x{self.k}->{self.n}"
        return f"{bits} {shape} {self.granularity} {self.out_dtype}{rank}{options}{codes}"


CASES = (
    Case(m=257, n=520, k=1040, integers=True, out_dtype="float32"),
    Case(m=257, n=520, k=1040, integers=True, row_sum=False, out_dtype="float32"),
    Case(m=1, n=264, k=3072, integers=True, out_dtype="float32"),
    Case(m=37, n=1000, k=320, integers=True, out_dtype="float32"),
    Case(m=130, n=256, k=512, integers=True, out_dtype="float32", codes="0"),
    Case(m=130, n=256, k=512, integers=True, out_dtype="float32", codes="1"),
    Case(m=130, n=256, k=512, integers=True, out_dtype="float32", codes="2"),
    *(
        Case(m=m, n=776, k=1280, activation_bits=bits, granularity=granularity)
        for m in (3, 300)
        for bits in (8, 16)
        for granularity in ("tensor", "channel", "group")
    ),
    *(
        Case(m=m, n=520, k=768, activation_bits=bits, gelu=True, extras=True, out_dtype=out)
        for m in (5, 200)
        for bits in (8, 16)
        for out in ("bfloat16", "float32")
    ),
    # More tokens than 16, and no more than 64: a kernel of their own.
    Case(m=40, n=520, k=768, gelu=True, extras=True),
    Case(m=40, n=520, k=768, activation_bits=16, gelu=True, extras=True),
    Case(m=64, n=520, k=768, activation_bits=16, extras=True, gates=2),
    Case(m=90, n=520, k=768, granularity="group", gelu=True, extras=True),
    # One gate a tile, and more than one.
    Case(m=768, n=520, k=768, extras=True, gates=3),
    Case(m=300, n=520, k=768, extras=True, gates=3),
    Case(m=16, n=264, k=768, activation_bits=16, extras=True, gates=2),
    # A low-rank branch: in the product's kernel, and beside it.
    Case(m=300, n=520, k=768, rank=16),
    Case(m=300, n=520, k=768, activation_bits=16, rank=48, gelu=True, extras=True),
    Case(m=768, n=264, k=1280, rank=200, extras=True, gates=3),
    Case(m=300, n=520, k=768, granularity="group", rank=64, extras=True, out_dtype="float32"),
    Case(m=40, n=520, k=768, rank=16, gelu=True, extras=True),
    Case(m=5, n=520, k=768, activation_bits=16, rank=16, gelu=True, extras=True),
)
# What interpret mode does in a minute.
SMALL_CASES = (
    Case(m=33, n=72, k=320, integers=True, out_dtype="float32"),
    Case(m=3, n=72, k=320, integers=True, out_dtype="float32"),
    Case(m=33, n=40, k=256, gelu=True, extras=True),
    Case(m=5, n=40, k=320, activation_bits=16, gelu=True, extras=True),
    Case(m=9, n=40, k=256, granularity="group", extras=True),
    Case(m=64, n=40, k=256, extras=True, gates=2),
    Case(m=30, n=40, k=256, extras=True, gates=2),
    Case(m=32, n=40, k=256, activation_bits=16, gelu=True, extras=True, gates=2),
    Case(m=20, n=40, k=320, gelu=True, extras=True),
    Case(m=70, n=40, k=320, rank=16, gelu=True, extras=True),
    Case(m=34, n=136, k=256, activation_bits=16, rank=72, extras=True),
    Case(m=9, n=40, k=256, rank=8, gelu=True, extras=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case went.

    Attributes:
      case: which.
      backend: on what.
      error: the largest error, as a share of what roundings explain; inf if an element that should
        be finite is not.
      repeats: whether every run gave the same bits.
    """

    case: Case
    backend: str
    error: float
    repeats: bool

    @property
    def passed(self) -> bool:
        """Exact integers if the case is of those, explained by rounding if not; the same twice."""
        return self.repeats and self.error <= (0.0 if self.case.integers else 1.0)


def make(case: Case, seed: int = 0) -> Arrays:
    """Random arguments. With six rows or more, one is zeros, one saturated, one inf, one NaN.

    Returns:
      Keyword arguments of the kernels: x, packed, scale; bias, token_scale, row_sum, gate,
      residual, u and v, each or None; and `codes`, (N, K) NumPy.
    """
    rng = np.random.default_rng(seed)
    if case.codes == "all":
        codes = rng.integers(0, 3, (case.n, case.k), np.uint8)
    else:
        codes = np.full((case.n, case.k), int(case.codes), np.uint8)
    made: Arrays = {"codes": codes, "packed": pack_codes(jnp.asarray(codes))}
    made |= dict.fromkeys(("bias", "token_scale", "row_sum", "gate", "residual", "u", "v"))
    if case.integers:
        x = rng.integers(-127, 128, (case.m, case.k)).astype(np.int8)
        x[-1], x[case.m // 2] = 127, -127
        return made | {
            "x": jnp.asarray(x),
            "scale": jnp.ones(case.n, jnp.float32),
            "token_scale": jnp.ones(case.m, jnp.float32),
            "row_sum": jnp.asarray(x.sum(-1, dtype=np.int32)) if case.row_sum else None,
        }
    shapes = {"tensor": (), "channel": (case.n,), "group": (case.n, group_count(case.k))}
    scale = rng.uniform(0.01, 0.05, shapes[case.granularity]).astype(np.float16)
    x = rng.standard_normal((case.m, case.k), np.float32)
    if case.m >= 6:
        x[1], x[2], x[3, 7], x[4, -1] = 0, np.sign(x[2]) * 100, np.inf, np.nan
    made |= {"x": jnp.asarray(x, jnp.bfloat16), "scale": jnp.asarray(scale)}
    made["bias"] = jnp.asarray(rng.standard_normal(case.n), jnp.bfloat16)
    if case.extras:
        made["gate"] = jnp.asarray(rng.standard_normal((case.gates, case.n)), jnp.bfloat16)
        made["residual"] = jnp.asarray(rng.standard_normal((case.m, case.n)), jnp.bfloat16)
    if case.rank:
        made["u"] = jnp.asarray(rng.standard_normal((case.m, case.rank)), jnp.bfloat16)
        made["v"] = jnp.asarray(rng.standard_normal((case.n, case.rank)), jnp.bfloat16)
    return made


def exact(case: Case, made: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64 from exact sums, and how far roundings may take it from that.

    Returns:
      (expected, bound): (M, N) each; NaN is expected of rows of x that are not finite.
    """
    x, token_scale = made["x"], made["token_scale"]
    if case.activation_bits == 8 and not case.integers:
        x, token_scale, _ = reference.quantize_activations(x)
    x = np.asarray(x).astype(np.float64)
    # Whatever quantising made of them.
    broken = ~np.isfinite(np.asarray(made["x"], np.float64)).all(axis=-1)
    signs = made["codes"].astype(np.float64) - 1
    scale = np.asarray(made["scale"], np.float64)
    if scale.ndim == 2:
        signs = signs * np.repeat(scale, GROUP, axis=1)[:, : case.k]
    else:
        signs = signs * scale.reshape(-1, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        y, magnitude = x @ signs.T, np.abs(x) @ np.abs(signs).T
        if token_scale is not None:
            wide = np.asarray(token_scale, np.float64)[:, None]
            y, magnitude = y * wide, magnitude * wide
        bias = 0.0 if made["bias"] is None else np.asarray(made["bias"], np.float64)
        # Integers and their groups' float32 sums; or sums of products.
        relative = SUMMATION if case.activation_bits == 16 else 4 * FLOAT32
        partial = magnitude if case.activation_bits == 16 or scale.ndim == 2 else np.abs(y)
        bound = relative * partial + 2 * FLOAT32 * (np.abs(y) + np.abs(bias))
        y = y + bias
        if case.rank:
            u, v = (np.asarray(made[name], np.float64) for name in ("u", "v"))
            y = y + u @ v.T
            bound = bound + SUMMATION * (np.abs(u) @ np.abs(v).T) + 2 * FLOAT32 * np.abs(y)
        if case.gelu:
            y = y / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            bound = 1.2 * bound + GELU_ERROR * np.abs(y)
        if made["gate"] is not None:
            gates = np.asarray(made["gate"], np.float64)
            gate = np.repeat(gates, case.m // len(gates), axis=0)
            residual = np.asarray(made["residual"], np.float64)
            y, bound = residual + gate * y, np.abs(gate) * bound
            bound = bound + 2 * FLOAT32 * (np.abs(y) + np.abs(residual))
        bound = bound + ROUNDING[case.out_dtype] * (np.abs(y) + bound) + 1e-38
    y[broken] = np.nan
    return y, bound


def check(
    case: Case, backend: str, multiply: Callable[..., Any], seed: int = 0, runs: int = 2
) -> Outcome:
    """Multiplies and compares.

    Args:
      case: which.
      backend: its name.
      multiply: takes the case and `make`'s arrays but the codes, returns (M, N).
      seed: of the arguments.
      runs: all of them must give the same bits.
    """
    made = make(case, seed)
    expected, bound = exact(case, made)
    arrays = {name: value for name, value in made.items() if name != "codes"}
    results = []
    for _ in range(runs):
        poison(expected.shape, case.out_dtype)
        results.append(np.asarray(multiply(case, **arrays)))
    y = results[0].astype(np.float64)
    finite = np.isfinite(expected) & np.isfinite(bound)
    # inf or NaN of the input must be seen in the result.
    seen = not np.isfinite(y[~finite]).any()
    distance = np.abs(y[finite] - expected[finite])
    share = distance if case.integers else distance / bound[finite]
    worst = float(share.max(initial=0.0)) if np.isfinite(share).all() and seen else np.inf
    same = len({result.tobytes() for result in results}) == 1
    return Outcome(case=case, backend=backend, error=worst, repeats=same)


def poison(shape: tuple[int, ...], dtype: str) -> None:
    """Leaves NaN where the next result of this size will likely be: what is not written shows."""
    full = [jnp.full(shape, jnp.nan, dtype) for _ in range(2)]
    jax.block_until_ready(full)


def arguments(arrays: Arrays) -> tuple[Any, Any, Operands]:
    """x, packed and the rest, as the backends take them, of `make`'s arrays but the codes."""
    others = {name: value for name, value in arrays.items() if name not in ("x", "packed")}
    return arrays["x"], arrays["packed"], Operands(**others)


def public_op(backend: str) -> Callable[..., Any]:
    """`ternary_matmul` on one backend, as `check` wants it."""
    from pallas_kernels.api import ternary_matmul

    def multiply(case: Case, **arrays: Any) -> Any:
        # The op's gates go with the first axis.
        for name in ("x", "token_scale", "row_sum", "residual", "u"):
            if arrays[name] is not None:
                array = arrays[name]
                arrays[name] = array.reshape(case.gates, -1, *array.shape[1:])
        branch = arrays.pop("u"), arrays.pop("v")
        arrays["low_rank"] = branch if case.rank else None
        y = jax.jit(
            lambda arrays: ternary_matmul(
                **arrays,
                activation_bits=case.activation_bits,
                out_dtype=jnp.dtype(case.out_dtype),
                gelu=case.gelu,
                backend=backend,
            )
        )(arrays)
        return y.reshape(case.m, case.n)

    return multiply


def interpreted_mosaic() -> Callable[..., Any]:
    """The Mosaic backend in Pallas' GPU interpret mode, as `check` wants it."""
    from pallas_kernels import mosaic
    from pallas_kernels.mosaic_api import interpret_params

    many = Tile(rows=64, tokens=32, store=32, stages=3, code_stages=2)

    def multiply(case: Case, **arrays: Any) -> Any:
        # The kernels for few and for fewest rows as they are; of the others small tiles.
        few = case.m <= 32 and case.granularity != "group"
        with warnings.catch_warnings():
            # Rows of inf and NaN, for NumPy, which multiplies in the place of the tensor cores.
            warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
            y = mosaic.ternary_matmul(
                *arguments(arrays),
                activation_bits=case.activation_bits,
                out_dtype=case.out_dtype,
                gelu=case.gelu,
                device=Device(kind="interpreted", multiprocessors=1),
                interpret=interpret_params(),
                tile=None if few else many,
            )
            return jax.block_until_ready(y)

    return multiply
