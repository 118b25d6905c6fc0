"""Programs kept traced and lowered, from one process to the next.

JAX's compilation cache spares a process the compiling, but a program must be traced and lowered
before it can be looked up there: with kernels, many seconds of Python for FLUX.1. What that gives
(StableHLO, by `jax.export`) is kept here, under a name made of everything it depends on, and
handed to the compiler again without running any of the model's code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

# Whose sources and tables decide what a program is.
_PACKAGES = ("flux_jax", "pallas_kernels", "ternary")
_LIBRARIES = ("jax", "jaxlib", "flax", "triton", "jax-triton", "tokamax")
# Of custom calls that `jax.export` does not vouch for in other versions of JAX: the version is part
# of the name.
_CUSTOM_CALLS = (
    "mosaic_gpu_v2",
    "triton_kernel_call",
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxF8",
    "__cudnn$fmhaScaleBiasSoftmax",
)
# A lowered program that nothing has used for so long is removed.
_KEPT_SECONDS = 90 * 24 * 3600
# What is written lies first in a folder of this name; left for so long, by a process that was
# killed.
_NEW, _WRITTEN_SECONDS = ".new-", 24 * 3600
# Of the digest in a program's name.
_DIGITS = 32
# What a program calls by these names is found only once the module is imported, which the model's
# code would have done: Mosaic's compiled kernels look for its runtime.
_RUNTIMES = {b"mosaic_gpu": "jax.experimental.mosaic.gpu"}
# Where Mosaic finds its libraries. It sets these when it is imported: with them, a program would
# have one name before that and another one after.
_PLACES = ("_ROOT", "_PATH")

Program = Callable[[list[Any], tuple[Any, ...]], Any]


def is_ours(module: nnx.Module) -> bool:
    """Whether all of a module's code is in packages whose sources are part of a program's name."""
    known = (*_PACKAGES, "flax")
    return all(
        type(part).__module__.partition(".")[0] in known for _, part in nnx.iter_modules(module)
    )


def has_own_name(function: Callable[..., Any]) -> bool:
    """Whether module and name tell a function from all others, and its source is known.

    A lambda, a closure and a bound method depend on more than their name says; the sources of
    other packages are no part of a program's name.
    """
    if not isinstance(function, types.FunctionType):
        return False
    known = function.__module__.partition(".")[0] in _PACKAGES
    return known and not {"<lambda>", "<locals>"} & set(function.__qualname__.split("."))


class StoredProgram:
    """`jax.jit` of a function of (arrays, arguments), lowered in this process only if never before.

    As `jax.jit`'s, it is called or lowered; the function must be pure and may close over nothing
    but what `made_of` names.
    """

    def __init__(self, function: Program, folder: Path, made_of: tuple[Any, ...], **options: Any):
        """A function and where its lowered programs are.

        Args:
          function: of a list of arrays and a tuple of arguments.
          folder: need not exist yet.
          made_of: what the function depends on, beside shapes; of things whose `repr` says all.
          **options: of `jax.jit`: shardings of one device.
        """
        self._function = function
        self._folder = folder
        self._made_of = made_of

        def found(leaves: list[Any], args: tuple[Any, ...]) -> Any:
            # Looked for while this is traced: then `jax.jit` knows when shapes or JAX's settings
            # are others.
            return self._find(leaves, args)(leaves, args)

        found.__name__ = function.__name__
        self._program = jax.jit(found, **options)

    def __call__(self, leaves: list[Any], args: tuple[Any, ...]) -> Any:
        return self._program(leaves, args)

    def lower(self, leaves: list[Any], args: tuple[Any, ...]) -> jax.stages.Lowered:
        """As of a jitted function; shapes are enough."""
        return self._program.lower(leaves, args)

    def _find(self, leaves: list[Any], args: tuple[Any, ...]) -> Program:
        from jax import export

        flat, tree = jax.tree.flatten((leaves, args))
        shapes = tuple(map(_shape, flat))
        name = _digest(*_environment(), *self._made_of, tree, shapes)
        path = self._folder / f"{self._function.__name__.strip('_')}-{name}"
        try:
            exported = export.deserialize(bytearray(path.read_bytes()))
            _used(path)
        except Exception:
            # Not there, or half of it: either way it is made.
            try:
                exported = self._export(tree, shapes)
                data = bytes(exported.serialize())
            except (ImportError, NotImplementedError, ValueError):
                # Not everything can be exported. It runs all the same.
                return self._function
            _write(path, data)
            _forget_old(path.parent)
        for name, module in _RUNTIMES.items():
            if name in exported.mlir_module_serialized:
                importlib.import_module(module)

        kept = set(exported.module_kept_var_idx)

        def call(leaves: list[Any], args: tuple[Any, ...]) -> Any:
            # `exported.call` uses all that it is given. What the program does not need is left to
            # `jax.jit` to leave out: modulation layers in host memory would be copied each step.
            flat = jax.tree.leaves((leaves, args))
            needed = (
                x if i in kept else jax.numpy.zeros(x.shape, x.dtype) for i, x in enumerate(flat)
            )
            return exported.call(*needed)

        return call

    def _export(self, tree: Any, shapes: tuple[Any, ...]) -> Any:
        from jax import export

        def call(*flat: Any) -> Any:
            return self._function(*jax.tree.unflatten(tree, flat))

        call.__name__ = self._function.__name__
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        return export.export(jax.jit(call), disabled_checks=checks)(*arguments)


def _shape(array: Any) -> tuple[tuple[int, ...], Any]:
    return tuple(array.shape), jax.numpy.dtype(array.dtype)


@functools.cache
def _packages_digest() -> str:
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or []:
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".json"):
                    digest.update(str(path.relative_to(root)).encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()


def _environment() -> tuple[Any, ...]:
    """What every program depends on: sources, versions, settings and the device."""
    device = jax.local_devices()[0]
    versions = []
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append((library, importlib.metadata.version(library)))
    names = [name for name in jax.config.values if "cache" not in name]
    # As they are in this thread, not as the process has them.
    settings = [(name, getattr(jax.config, name, None)) for name in sorted(names)]
    variables = {
        name: value
        for name, value in os.environ.items()
        # Kernels are compiled by Triton and Mosaic while they are lowered.
        if name.startswith(("TRITON_", "MOSAIC_", "XLA_"))
        and "CACHE" not in name
        and not (name.startswith("MOSAIC_") and name.endswith(_PLACES))
    }
    return (
        _packages_digest(),
        versions,
        settings,
        sorted(variables.items()),
        device.platform,
        device.device_kind,
        device.client.platform_version,
        sys.version_info[:2],
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:_DIGITS]


def _used(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def _forget_old(folder: Path) -> None:
    """Removes what no process has used for long: each new version leaves its programs behind."""
    now = time.time()
    with contextlib.suppress(OSError):
        for path in list(folder.glob(f"*-{'[0-9a-f]' * _DIGITS}")):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - _KEPT_SECONDS:
                    path.unlink()
        for path in list(folder.glob(f"{_NEW}*")):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - _WRITTEN_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing; a folder that cannot be written to is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_NEW) as folder:
            file = Path(folder) / path.name
            file.write_bytes(data)
            os.replace(file, path)
