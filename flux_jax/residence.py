"""What of a pipeline is on the device, and what waits in host memory until it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
from flax import nnx

from flux_jax.transformer import FluxTransformer

# Where text encoders may be; "auto" chooses by the device's memory.
RESIDENT, OFFLOADED, STREAMED, AUTO = "resident", "offloaded", "streamed", "auto"
PLACEMENTS = (AUTO, RESIDENT, OFFLOADED, STREAMED)

# Of the device's memory, what text encoders that stay must leave: room for the work of a step and
# of the decoder, which at 1024 x 1024 pixels is 3 GiB at most.
_LEFT = 0.25


class HostWeights:
    """Modules whose arrays wait in host memory, and are on their device for a block's length."""

    def __init__(self, modules: Sequence[nnx.Module]):
        """Moves the arrays to the host. Bound functions keep what they were bound to."""
        states = [nnx.state(module) for module in modules]
        self._modules = list(modules)
        self._places = [jax.tree.map(lambda array: array.sharding, state) for state in states]
        self._host = jax.device_get(states)
        self._leave()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The arrays where they were; results must be there before the end of the block."""
        try:
            self.bring_back()
            yield
        finally:
            self._leave()

    def bring_back(self) -> None:
        """The arrays where they were, for good: the modules may then be changed."""
        for module, host, places in zip(self._modules, self._host, self._places, strict=True):
            nnx.update(module, jax.device_put(host, places))

    def _leave(self) -> None:
        for module, host in zip(self._modules, self._host, strict=True):
            nnx.update(module, host)


def modulation_layers(transformer: FluxTransformer) -> list[nnx.Module]:
    """What computes the modulation vectors: a quarter of the weights, idle during the loop."""
    doubles = [layer for b in transformer.double_blocks for layer in (b.img_mod, b.txt_mod)]
    singles = [block.modulation for block in transformer.single_blocks]
    return [*doubles, *singles, transformer.final_layer.adaLN_modulation]


def device_memory() -> tuple[int, int] | None:
    """(limit, free) bytes of the first device, as its allocator tells; None where it does not."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
    return None if limit is None or used is None else (limit, limit - used)


def fits(nbytes: int) -> bool:
    """Whether so many bytes can stay on the device beside what is there, with room for work.

    A device that does not tell its memory (a CPU) is taken to have enough.
    """
    memory = device_memory()
    return memory is None or nbytes <= memory[1] - _LEFT * memory[0]
