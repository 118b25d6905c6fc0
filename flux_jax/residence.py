"""What of a pipeline is on the device, and what waits in host memory until it is needed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from flux_jax.transformer import FluxTransformer
from pallas_kernels.backends import default_device

# Where text encoders may be; "auto" chooses by the device's memory.
RESIDENT, OFFLOADED, STREAMED, AUTO = "resident", "offloaded", "streamed", "auto"
PLACEMENTS = (AUTO, RESIDENT, OFFLOADED, STREAMED)

# Of the device's memory, what text encoders that stay must leave: room for the work of a step and
# of the decoder, which at 1024 x 1024 pixels is 3 GiB at most.
_LEFT = 0.25


class HostWeights:
    """Modules whose arrays wait in host memory, and are on their device for a block's length.

    The modules hold the arrays wherever they are: what is written to them meanwhile counts.
    """

    def __init__(self, modules: Sequence[nnx.Module], *, home: Sharding | None = None):
        """Moves the arrays to the host. Bound functions keep what they were bound to.

        Args:
          modules: whose arrays.
          home: where those belong that wait on the host already, for another pipeline of the same
            modules; None for the default device.
        """
        home = SingleDeviceSharding(default_device()) if home is None else home
        states = [nnx.state(module) for module in modules]
        self._modules = list(modules)
        self._places = [
            jax.tree.map(lambda array: getattr(array, "sharding", home), state) for state in states
        ]
        # Threads may be inside `on_device` together: the first brings, the last takes away.
        self._lock = threading.Lock()
        self._inside = 0
        # Of each module that was brought: what it held on the host, and holds on the device.
        self._brought: list[tuple[nnx.Module, Any, Any]] = []
        for module, state in zip(modules, states, strict=True):
            nnx.update(module, jax.device_get(state))

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The arrays where they were; results must be there before the end of the block."""
        with self._lock:
            if self._inside == 0:
                self._bring()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._leave()

    def bring_back(self) -> None:
        """The arrays where they were, for good: the modules may then be changed."""
        with self._lock:
            if self._inside == 0:
                self._bring()
            self._brought.clear()

    def _bring(self) -> None:
        try:
            for module, places in zip(self._modules, self._places, strict=True):
                # A copy of the tree: the module's own follows what is written to the module.
                held = jax.tree.map(lambda array: array, nnx.state(module))
                placed = jax.device_put(held, places)
                self._brought.append((module, held, placed))
                nnx.update(module, placed)
        except BaseException:
            # The device may be full: what has arrived makes room.
            self._leave()
            raise

    def _leave(self) -> None:
        while self._brought:
            module, held, placed = self._brought.pop()
            nnx.update(module, jax.tree.map(_on_host, held, placed, nnx.state(module)))


def _on_host(held: Any, placed: Any, now: Any) -> np.ndarray:
    """An array on the host: the one that waited there, unless another was written meanwhile."""
    return held if now is placed and isinstance(held, np.ndarray) else jax.device_get(now)


def modulation_layers(transformer: FluxTransformer) -> list[nnx.Module]:
    """What computes the modulation vectors: a quarter of the weights, idle during the loop."""
    doubles = [layer for b in transformer.double_blocks for layer in (b.img_mod, b.txt_mod)]
    singles = [block.modulation for block in transformer.single_blocks]
    return [*doubles, *singles, transformer.final_layer.adaLN_modulation]


def device_memory(device: jax.Device | None = None) -> tuple[int, int] | None:
    """(limit, free) bytes of a device, as its allocator tells; None where it does not.

    Args:
      device: of this process; the default one if None.
    """
    stats = (default_device() if device is None else device).memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
    return None if limit is None or used is None else (limit, limit - used)


def fits(nbytes: int) -> bool:
    """Whether so many bytes can stay on the device beside what is there, with room for work.

    It is the default one; one that does not tell its memory (a CPU) is taken to have enough.
    """
    memory = device_memory()
    return memory is None or nbytes <= memory[1] - _LEFT * memory[0]
