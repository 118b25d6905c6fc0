"""Set-up of every test run.

- CPU with eight fake devices, unless the run asks for GPU tests (`pytest -m gpu`).
- Rank promotion raises: a broadcast between different ranks must be written out.
- jaxtyping's shapes are checked at run time, by beartype, in our packages (under pytest only).
- No network, and nothing written to the user's caches.

This module runs before anything imports JAX, which reads its settings from the environment.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("convert", "flux_jax", "pallas_kernels", "ternary")
ROOT = Path(__file__).resolve().parent.parent


def _asks_for_gpu(arguments: list[str]) -> bool:
    """Whether the command line selects GPU tests: `-m gpu`, `-m "gpu and ..."`."""
    marks = [after for flag, after in zip(arguments, arguments[1:], strict=False) if flag == "-m"]
    return any("gpu" in mark and "not gpu" not in mark for mark in marks)


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="flux-jax-test-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _set_environment() -> None:
    worker = "PYTEST_XDIST_WORKER" in os.environ
    # Of the whole run: what one worker or a test's process has compiled, the others find.
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] if worker else _temporary_folder()
    environment = {
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TRITON_CACHE_DIR": os.path.join(cache, "triton"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    # Set here for xdist's workers, which do not see the command line.
    chosen = "gpu" if _asks_for_gpu(sys.argv) else "cpu"
    if os.environ.setdefault("FLUX_JAX_TEST_PLATFORM", chosen) == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        # The tests spend their time on compiling small programs. Unoptimised, in one piece and
        # without MLIR, that takes a third as long. A test's processes share the flags: bits agree.
        for flag, value in (
            ("--xla_force_host_platform_device_count", 8),
            ("--xla_backend_optimization_level", 0),
            ("--xla_cpu_parallel_codegen_split_count", 1),
            ("--xla_backend_extra_options", "xla_cpu_disable_new_fusion_emitters"),
        ):
            if flag not in flags:
                flags = f"{flags} {flag}={value}".strip()
        environment["XLA_FLAGS"] = flags
    if worker:
        # One process a core: torch's thread pools would fight over them.
        environment["OMP_NUM_THREADS"] = "1"
    os.environ.update(environment)


_set_environment()


def _check_shapes() -> None:
    """Installs jaxtyping's import hook. It wants the checker as an importable name."""
    import beartype
    import jaxtyping

    checker = types.ModuleType("flux_jax_shape_checker")
    # The numeric tower: an int is a float, as for every static type checker.
    checker.check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
    sys.modules[checker.__name__] = checker
    jaxtyping.install_import_hook(list(PACKAGES), f"{checker.__name__}.check")


_HAS_BEARTYPE = importlib.util.find_spec("beartype") is not None
if _HAS_BEARTYPE:
    _check_shapes()

_ABSENT = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["parity/*"] if _ABSENT else []


def pytest_report_header() -> list[str]:
    lines = [f"array shapes: {'checked' if _HAS_BEARTYPE else 'NOT checked, no beartype'}"]
    if _ABSENT:
        lines.append(f"tests/parity: left out, {' and '.join(_ABSENT)} not installed")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests/parity, and skips what this machine cannot run, with the reason.

    Files with slow tests come first: two processes then end at about the same time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    parity = ROOT / "tests" / "parity"
    gpu: bool | None = None
    for item in items:
        if item.path.is_relative_to(parity):
            item.add_marker(pytest.mark.parity)
        if item.get_closest_marker("gpu"):
            if gpu is None:
                import jax

                gpu = jax.default_backend() == "gpu"
            if not gpu:
                reason = "needs an NVIDIA GPU and `pytest -m gpu`"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what passing tests measured: `record_property("measured", "a line")`.

    What they print themselves is lost where xdist runs them.
    """
    lines = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "measured"
    ]
    if lines:
        terminalreporter.section("measured")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _lower_anew() -> Iterator[None]:
    """A command run inside a test turns the cache of lowered programs on: for that test alone."""
    yield
    if "flux_jax.compile_cache" in sys.modules:
        from flux_jax import compile_cache

        compile_cache._enabled.clear()


# Of the 65,530 mappings that Linux allows a process; past them, compiling ends in a crash.
_MANY_MAPPINGS = 20_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, lets go of compiled programs when they are many: each maps memory."""
    if nextitem is None or nextitem.path == item.path or "jax" not in sys.modules:
        return
    try:
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
    except OSError:
        # Not Linux.
        return
    if count > _MANY_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
