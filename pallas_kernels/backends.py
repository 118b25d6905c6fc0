"""Which backend computes a product: what each one needs, and the choice between them.

mosaic   Pallas Mosaic GPU kernels, for the tensor cores of Hopper (compute capability 9.x)
triton   a Triton kernel through jax-triton, for compute capability 8.0 and newer
jax      plain JAX, anywhere; also the reference of the others
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels.tile_table import Device

BACKENDS = ("mosaic", "triton", "jax")


def device_of(x: Any) -> Any:
    """Where x lies, or where a traced x will most likely lie: JAX's default device."""
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return next(iter(x.devices()))
    return default_device()


def default_device() -> Any:
    """Where arrays go that are placed nowhere: JAX's `jax_default_device`, if it is set.

    Else the first device of this process.
    """
    # There, but not in its types: a device, or the name of a platform.
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def is_spread(*arrays: Any) -> bool:
    """Whether any array lies on several devices: XLA partitions plain JAX, but no kernel.

    Of traced arrays nothing is known; they, and None, count as lying on one.
    """
    return any(
        isinstance(array, jax.Array)
        and not isinstance(array, Tracer)
        and len(array.sharding.device_set) > 1
        for array in arrays
    )


def describe(device: Any) -> Device:
    """What tiles are chosen for."""
    cores = getattr(device, "core_count", None) if device.platform != "cpu" else None
    return Device(kind=device.device_kind, multiprocessors=int(cores or 0))


def choose(
    backend: str | None, device: Any, x_dtype: Any, out_dtype: Any, activation_bits: int
) -> str:
    """The backend to use.

    Args:
      backend: one of `BACKENDS`, which is then used or refused; None for the first that can run.
      device: where the product will run.
      x_dtype, out_dtype: of activations and result.
      activation_bits: 8 or 16.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the backend that is asked for cannot run; says why, and what would.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        reason = why_not(backend, device, x_dtype, out_dtype, activation_bits)
        if reason:
            raise NotImplementedError(
                f"backend {backend!r} cannot run this product: {reason}; "
                f"leave backend=None to use what can"
            )
        return backend
    for name in BACKENDS:
        if why_not(name, device, x_dtype, out_dtype, activation_bits) is None:
            return name
    raise AssertionError("plain JAX computes every product")


def why_not(
    backend: str, device: Any, x_dtype: Any, out_dtype: Any, activation_bits: int
) -> str | None:
    """Why a backend cannot compute such a product on a device; None if it can."""
    if backend == "jax":
        return None
    capability = compute_capability(device)
    if capability is None:
        return f"it needs an NVIDIA GPU, got the {device.platform} device {device.device_kind!r}"
    version = f"{capability[0]}.{capability[1]}"
    if backend == "mosaic" and capability[0] != 9:
        return f"it needs compute capability 9.x (Hopper), got {version}"
    if backend == "mosaic" and not describe(device).multiprocessors:
        return "it needs to know how many multiprocessors there are, which JAX does not say here"
    if backend == "triton" and capability < (8, 0):
        return f"it needs compute capability 8.0 or more, got {version}"
    if backend == "triton" and (missing := missing_triton()):
        return missing
    kinds = {"mosaic": (jnp.bfloat16,), "triton": (jnp.bfloat16, jnp.float16)}[backend]
    names = " or ".join(jnp.dtype(kind).name for kind in kinds)
    if activation_bits == 16 and x_dtype not in kinds:
        return f"with 16-bit activations it needs x of {names}, got {jnp.dtype(x_dtype).name}"
    if out_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it writes bfloat16, float16 or float32, got {jnp.dtype(out_dtype).name}"
    return None


def compute_capability(device: Any) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU; None of anything else."""
    capability = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or capability is None:
        return None
    major, _, minor = str(capability).partition(".")
    # AMD's GPUs answer with a name such as gfx942.
    return (int(major), int(minor or 0)) if major.isdigit() else None


@functools.cache
def missing_triton() -> str | None:
    """What of Triton and jax-triton cannot be imported, in words; None if nothing."""
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error}): pip install 'flux-jax[triton]'"
    return None
