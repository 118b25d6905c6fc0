"""gemlite's ternary linears (PyTorch, Triton), W1.58A16 and W1.58A8, and torch's bf16 linear.

Needs torch, triton, gemlite and an NVIDIA GPU, nothing of JAX. Run by `benchmarks.ternary_kernels`;
alone:

    python -m benchmarks.peers.gemlite_linear --output peer.json --shapes 4608x3072x9216

Every time is from bfloat16 to bfloat16 with bias, with what gemlite does for it: A8 quantises its
activations. As ours, each is timed once the card has come to the clock that it keeps under it.
gemlite tunes itself to each shape first. A product that is wrong, fails or takes too long is told
and left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import run
from benchmarks.machine import GIB, package_versions
from pallas_kernels.errors import UserError
from pallas_kernels.shapes import FEW, MANY, SMALL, WARM_SECONDS, sets_of

A16, A8, BF16 = "a16", "a8", "bf16_linear"
AUTOTUNE = ("fast", "max", "default")
GRAPH, QUEUED = "CUDA graph", "queued calls"

Shape = tuple[int, int, int]

# Each timing lasts so long: what the launch of a graph takes is lost in it.
TIMED_MS = 5.0
# Of the output's norm. Activations of 8 bits are off by 1%, and so are sums of a hundred parts in
# bfloat16, as gemlite adds those of one row; a wrong layout, scale or bias is off by 100%.
TOLERANCE = 0.05
SCALE = 0.03
# Seconds for one product, tuning included, and for compiling all of them beforehand.
LIMIT_S, COMPILE_S = 60.0, 150.0
# A compiling process holds a context of the device and one layer.
COMPILER_BYTES = 2 * GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One time.

    Attributes:
      shape: tokens, inputs, outputs.
      what: "a16", "a8" or "bf16_linear".
      ms: median, of one call.
      error: norm of the difference to the product in float64, over that product's norm.
      how: "CUDA graph" or "queued calls", what the calls were timed in.
    """

    shape: Shape
    what: str
    ms: float
    error: float
    how: str


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`4608x3072x9216,1x3072x9216`: tokens, inputs, outputs.

    Raises:
      UserError: it is something else.
    """
    found = []
    for one in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", one.strip())
        if match is None:
            raise UserError(f"--shapes: expected TOKENSxINPUTSxOUTPUTS, got {one!r}")
        found.append((int(match[1]), int(match[2]), int(match[3])))
    return tuple(found)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the block with a TimeoutError once its time is up.

    Only between two steps of Python: a kernel that never ends is not ended.
    """

    def end(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def random_set(
    shape: Shape, seed: int, device: str, *, spread: bool = False
) -> tuple[Any, Any, Any]:
    """Random (activations (M, K), signs (N, K), bias (N,)), all bfloat16.

    Args:
      shape: (M, K, N).
      seed: of all of them.
      device: torch's name of it.
      spread: normal values in the place of signs, as a dense weight has them: of signs alone a
        product takes less power, and so less time.
    """
    import torch

    m, k, n = shape
    generator = torch.Generator(device).manual_seed(seed)
    places: dict[str, Any] = {"generator": generator, "device": device}
    if spread:
        signs = torch.randn(n, k, dtype=torch.bfloat16, **places)
    else:
        signs = torch.randint(-1, 2, (n, k), dtype=torch.int8, **places).to(torch.bfloat16)
    return (
        torch.randn(m, k, dtype=torch.bfloat16, **places),
        signs,
        torch.randn(n, dtype=torch.bfloat16, **places),
    )


def error_of(y: Any, x: Any, signs: Any, bias: Any) -> float:
    """Norm of the difference to the product in float64, over that product's norm.

    Raises:
      RuntimeError: it is more than rounding explains.
    """
    exact = SCALE * (x.double() @ signs.double().T) + bias.double()
    error = float((y.double() - exact).norm() / exact.norm())
    # Not `>`: a NaN is no product either.
    if not error <= TOLERANCE:
        raise RuntimeError(f"wrong: off by {error:.1%} of the output, expected {TOLERANCE:.0%}")
    return error


def layer(what: str, signs: Any, bias: Any) -> Callable[[Any], Any]:
    """The linear of `what`, on the signs' device."""
    import torch

    device = str(signs.device)
    if what == BF16:
        weight = SCALE * signs
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    from gemlite import helper  # pyright: ignore[reportMissingImports]

    make = {A16: helper.A16W158_INT, A8: helper.A8W158_INT_dynamic}[what]
    found = make(device=device, dtype=torch.bfloat16)
    # Onto the device once more: A16W158_INT leaves its scales on the host.
    return found.from_weights(signs, torch.tensor(SCALE), bias).to(device)


def program_of(calls: Callable[[], list[Any]]) -> tuple[Callable[[], list[Any]], str]:
    """What runs the calls with the least work of the host, and its name.

    Args:
      calls: launches them and gives their outputs; it has run before.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    # Calls on the stream of a capture behave otherwise the first time.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            calls()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            outputs = calls()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"  no CUDA graph: {first_line(error)}", flush=True)
        return calls, QUEUED

    def replay() -> list[Any]:
        graph.replay()
        return outputs

    return replay, GRAPH


def time_calls(calls: Callable[[], list[Any]], repeats: int) -> tuple[float, str, list[Any]]:
    """Median milliseconds of all the calls, how they were run, and their outputs."""
    import torch

    program, how = program_of(calls)

    def elapsed(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            program()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    elapsed(1)
    times = max(2, math.ceil(TIMED_MS / elapsed(2)))
    warm = 1e3 * WARM_SECONDS
    while warm > 0:
        warm -= times * elapsed(times)
    ms = statistics.median(elapsed(times) for _ in range(repeats))
    outputs = program()
    torch.cuda.synchronize()
    return ms, how, outputs


def measure(
    shape: Shape,
    what: str,
    *,
    device: str = "cuda:0",
    repeats: int = 15,
    build: Callable[[str, Any, Any], Callable[[Any], Any]] = layer,
    timed: Callable[..., tuple[float, str, list[Any]]] = time_calls,
) -> Timing:
    """Tunes, checks and times one product.

    Args:
      shape: tokens, inputs, outputs.
      what: see `Timing`.
      device: torch's name of it.
      repeats: timings of the median.
      build: as `layer`.
      timed: as `time_calls`.

    Raises:
      RuntimeError: its result is wrong.
    """
    import torch

    count, spread = sets_of(*shape), what == BF16
    sets = [random_set(shape, seed, device, spread=spread) for seed in range(count)]
    with torch.no_grad():
        linears = [(build(what, signs, bias), x) for x, signs, bias in sets]
        # The first call tunes.
        error_of(linears[0][0](linears[0][1]), *sets[0])
        last = sets[-1]
        del sets

        def calls() -> list[Any]:
            return [linear(x) for linear, x in linears]

        calls()
        ms, how, outputs = timed(calls, repeats)
        # Of the program that was timed, which a captured one may do wrong on its own.
        error = error_of(outputs[-1], *last)
    return Timing(shape=shape, what=what, ms=ms / len(linears), error=error, how=how)


def measure_all(
    shapes: Sequence[Shape],
    kinds: Sequence[str],
    budget_s: float,
    measure_one: Callable[[Shape, str], Timing],
) -> tuple[list[Timing], list[str]]:
    """The times of all, and what was left out and why.

    Args:
      shapes: tokens, inputs, outputs.
      kinds: see `Timing.what`.
      budget_s: seconds for all of it; what is not done then is left out.
      measure_one: of a shape and a kind.
    """
    deadline = time.monotonic() + budget_s
    found, left_out = [], []
    for m, k, n in shapes:
        for what in kinds:
            name = f"{what} {m}x{k}x{n}"
            try:
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise TimeoutError(f"the {budget_s:.0f} s for all are over")
                with within(min(LIMIT_S, rest)):
                    one = measure_one((m, k, n), what)
            # Whatever another project's kernels may raise: the other shapes go on.
            except Exception as error:
                left_out.append(f"{name}: {first_line(error)}")
                print(f"  {name}: left out: {first_line(error)}", flush=True)
            else:
                found.append(one)
                print(f"  {name}: {one.ms:.4f} ms, off by {one.error:.2%}, {one.how}", flush=True)
    return found, left_out


def first_line(error: BaseException) -> str:
    """The kind of the error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def use_autotune(mode: str) -> None:
    """Makes gemlite tune itself at the first call of each shape, whatever tables it came with."""
    import gemlite  # pyright: ignore[reportMissingImports]

    gemlite.set_autotune(mode)
    gemlite.reset_config()


@functools.cache
def _start_compiler(mode: str) -> None:
    import triton.testing  # pyright: ignore[reportMissingImports]

    # Ctrl-C is for the process that waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def once(call: Callable[[], Any], quantiles: Sequence[float] = (0.5,), **_: Any) -> list[float]:
        call()
        return [1.0] * len(quantiles)

    # The times of processes side by side mean nothing: each candidate only has to be compiled.
    triton.testing.do_bench = once
    use_autotune(mode)


def _compile(mode: str, shape: Shape, what: str) -> None:
    # Here, once, and not as the pool's initializer: one that fails is started again without end.
    _start_compiler(mode)
    import torch

    x, signs, bias = random_set(shape, 0, "cuda:0")
    with torch.no_grad():
        layer(what, signs, bias)(x)
    torch.cuda.synchronize()


def compile_all(shapes: Sequence[Shape], mode: str, jobs: int) -> None:
    """Fills Triton's cache on disk with every candidate of every shape.

    The sizes are constants of gemlite's kernels, so there are hundreds to compile, and a process
    alone compiles one after the other.

    Args:
      shapes: tokens, inputs, outputs.
      mode: see `use_autotune`.
      jobs: processes.
    """
    deadline = time.monotonic() + COMPILE_S
    context = multiprocessing.get_context("spawn")
    # Leaving it ends its processes, at work or not.
    with context.Pool(jobs) as pool:
        waiting = [
            (shape, what, pool.apply_async(_compile, (mode, shape, what)))
            for shape in shapes
            for what in (A16, A8)
        ]
        for (m, k, n), what, result in waiting:
            try:
                result.get(max(0.0, deadline - time.monotonic()))
            # What cannot be compiled is told again when it is measured.
            except Exception as error:
                print(f"  compiling {what} {m}x{k}x{n}: {first_line(error)}", flush=True)


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")],
    shapes: Annotated[
        str | None,
        typer.Option(help="TOKENSxINPUTSxOUTPUTS, separated by commas; FLUX.1-dev's if none."),
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="One small shape, to try it.")] = False,
    autotune: Annotated[
        str, typer.Option(help="gemlite's candidates: fast, default (fewer) or max (thousands).")
    ] = "fast",
    repeats: Annotated[int, typer.Option(min=1, help="Timings that each median is over.")] = 15,
    budget_s: Annotated[float, typer.Option(help="Seconds for all, compiling apart.")] = 240.0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile; one: none beforehand.")
    ] = None,
) -> None:
    """Times gemlite's ternary linears and torch's bf16 linear."""
    if autotune not in AUTOTUNE:
        raise UserError(f"--autotune: expected one of {', '.join(AUTOTUNE)}, got {autotune}")
    chosen = parse_shapes(shapes) if shapes else SMALL if tiny else (*MANY, *FEW)
    try:
        import torch
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"needs torch, triton and gemlite: {error}") from None
    # gemlite asks for the device when it is imported.
    if not torch.cuda.is_available():
        raise UserError("needs an NVIDIA GPU")
    try:
        use_autotune(autotune)
    except ImportError as error:
        raise UserError(f"needs torch, triton and gemlite: {error}") from None
    fitting = int(torch.cuda.mem_get_info()[0] // COMPILER_BYTES)
    jobs = min(jobs or min(os.cpu_count() or 1, 16), max(fitting, 1), 2 * len(chosen))
    start = time.monotonic()
    if jobs > 1:
        compile_all(chosen, autotune, jobs)
        print(f"  gemlite: compiled in {time.monotonic() - start:.0f} s", flush=True)
    one = functools.partial(measure, repeats=repeats)
    found, left_out = measure_all(chosen, (A16, A8, BF16), budget_s, one)
    print(f"  gemlite: done after {time.monotonic() - start:.0f} s", flush=True)
    if not any(timing.what != BF16 for timing in found):
        raise SystemExit("error: gemlite computed no shape")
    figures = {
        "versions": package_versions("torch", "triton", "gemlite"),
        "device": torch.cuda.get_device_name(0),
        "autotune": autotune,
        "timings": [dataclasses.asdict(timing) for timing in found],
        "left_out": left_out,
    }
    output.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    run(main)
