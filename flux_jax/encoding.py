"""T5 block by block: from weights on the device, or from weights that come from the host.

All blocks run through one compiled program, wherever their weights are, so that both ways give the
same bits (and compile one block instead of 24). Streamed, the device holds two blocks at a time:
one computes while the next arrives. All prompts go through a block before it is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.tree_util import DictKey
from jaxtyping import Array, Float, Int

from flux_jax.components import abstract_module
from flux_jax.configs import T5Config
from flux_jax.fingerprint import Checksum, checksum, checksums, digest_of_sums
from flux_jax.functional import BoundFunction, ModuleFunction
from flux_jax.layers import Embedding
from flux_jax.sharding import mesh_of, place_shapes
from flux_jax.t5 import RMSNorm, T5Block, T5Encoder, position_bias
from flux_jax.tree import to_flat

# Tensors read from the checkpoint at the same time: one thread copies from the page cache slower
# than the device takes.
_READERS = 8

Read = Callable[[str], np.ndarray]
Sums = dict[str, Checksum]


def _embed(table: Embedding, ids: Int[Array, "B T"]) -> Float[Array, "B T C"]:
    return table(ids)


def _bias(table: Embedding, *, config: T5Config, length: int) -> Float[Array, "1 H T T"]:
    return position_bias(table, config, length)


def _block(
    block: T5Block, x: Float[Array, "B T C"], bias: Float[Array, "1 H T T"]
) -> Float[Array, "B T C"]:
    return block(x, bias)


def _norm(norm: RMSNorm, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    return norm(x)


T5_EMBED, T5_BIAS = ModuleFunction(_embed), ModuleFunction(_bias)
T5_BLOCK, T5_NORM = ModuleFunction(_block), ModuleFunction(_norm)


def t5_states(
    encoder: T5Encoder, batches: Sequence[Int[np.ndarray, "B T"]]
) -> list[Float[Array, "B T C"]]:
    """The last hidden states of each batch, from an encoder on the device.

    Args:
      encoder: its weights on one device, or on one mesh.
      batches: token ids, all of one shape.
    """
    length = batches[0].shape[1]
    bias = T5_BIAS.bind(encoder.relative_attention_bias, config=encoder.config, length=length)()
    embed = T5_EMBED.bind(encoder.token_embedding)
    states = [embed(ids) for ids in batches]
    for block in encoder.blocks:
        bound = T5_BLOCK.bind(block)
        states = [bound(x, bias) for x in states]
    norm = T5_NORM.bind(encoder.final_norm)
    return [norm(x) for x in states]


class _Part:
    """A piece of the encoder in shapes alone, and the program that runs it with any weights."""

    def __init__(self, function: ModuleFunction, module: nnx.Module, **static: Any):
        paths, _ = jax.tree_util.tree_flatten_with_path(nnx.state(module))
        self._places = {
            ".".join(str(key.key) for key in path if isinstance(key, DictKey)): leaf.sharding
            for path, leaf in paths
        }
        self._function = function.bind(module, **static)

    def fetch(
        self, pool: ThreadPoolExecutor, read: Read, prefix: str, sums: Sums | None
    ) -> list[Future[Array]]:
        """Its weights, on their way to the device; their checksums go to `sums`."""

        def bring(name: str, place: Sharding) -> Array:
            array = jax.block_until_ready(jax.device_put(read(prefix + name), place))
            if sums is not None:
                sums[prefix + name] = checksum(array)
            return array

        return [pool.submit(bring, name, place) for name, place in self._places.items()]

    def bind(self, weights: Sequence[Future[Array]]) -> BoundFunction:
        """The program with weights that have arrived."""
        return dataclasses.replace(self._function, leaves=[one.result() for one in weights])

    def place(self, array: np.ndarray) -> Array:
        """An input, where the program takes it."""
        return self._function.place(array)[0]


class StreamedT5:
    """The encoder with its weights elsewhere: on the host, or in a checkpoint's files.

    Attributes:
      config: sizes.
    """

    def __init__(
        self,
        config: T5Config,
        open_weights: Callable[[], AbstractContextManager[Read]],
        *,
        dtype: Any,
        mesh: Mesh | None = None,
    ):
        """An encoder of weights that are looked for when they are needed.

        Args:
          config: sizes.
          open_weights: gives, for the length of a block, a function from a parameter's dotted path
            to its values in host memory, of `dtype`. The function is called from several threads.
          dtype: of the parameters, hence of the computation.
          mesh: devices to spread each block over; without one, the default device.
        """
        self.config = config
        self._open = open_weights
        self._dtype = dtype
        # One block stands for all.
        module = abstract_module("text_encoder_2", dataclasses.replace(config, num_layers=1), dtype)
        self._shapes = {path: value.shape for path, value in to_flat(module).items()}
        place_shapes(module, mesh)
        self._module = module
        self._block = _Part(T5_BLOCK, module.blocks[0])
        self._norm = _Part(T5_NORM, module.final_norm)
        self._sums: Sums | None = None

    @classmethod
    def from_module(cls, module: T5Encoder) -> StreamedT5:
        """An encoder whose arrays stay in host memory from now on."""
        flat = to_flat(module)
        first = flat["final_norm.weight"]
        # Copies: on a CPU NumPy would only look at the arrays, and keep them.
        host = {path: np.array(value) for path, value in flat.items()}
        return cls(
            module.config,
            lambda: contextlib.nullcontext(host.__getitem__),
            dtype=first.dtype,
            mesh=mesh_of(first),
        )

    def on(self, mesh: Mesh) -> StreamedT5:
        """The same weights, for the devices of a mesh."""
        return StreamedT5(self.config, self._open, dtype=self._dtype, mesh=mesh)

    def states(
        self, batches: Sequence[Int[np.ndarray, "B T"]], *, for_digest: bool = False
    ) -> list[Float[Array, "B T C"]]:
        """As `t5_states`, bit for bit.

        Args:
          batches: as there.
          for_digest: whether what `digest` needs is kept, so that it reads nothing again.
        """
        sums: Sums | None = {} if for_digest else None
        length = batches[0].shape[1]
        bias_part = _Part(
            T5_BIAS, self._module.relative_attention_bias, config=self.config, length=length
        )
        with self._open() as read, ThreadPoolExecutor(_READERS) as pool:
            arriving = self._fetch(pool, read, 0, sums)
            bias = bias_part.bind(bias_part.fetch(pool, read, "relative_attention_bias.", sums))()
            # The rows that are needed, not the table.
            table = read("token_embedding.weight")
            if sums is not None:
                sums["token_embedding.weight"] = checksum(table)
            states = [self._block.place(table[ids]) for ids in batches]
            del table
            for layer in range(self.config.num_layers):
                block = self._block.bind(arriving)
                # The block before is gone by now: with this one there are two.
                arriving = self._fetch(pool, read, layer + 1, sums)
                states = [block(x, bias) for x in states]
                jax.block_until_ready(states)
                del block
            norm = self._norm.bind(self._norm.fetch(pool, read, "final_norm.", sums))
            self._sums = sums or self._sums
            return [norm(x) for x in states]

    def digest(self, name: str) -> str:
        """As `flux_jax.fingerprint.component_digest` of the whole encoder; it is read once."""
        if self._sums is None:
            with self._open() as read:
                self._sums = checksums((path, read(path)) for path in self._paths())
        return digest_of_sums(name, self._sums)

    def _fetch(
        self, pool: ThreadPoolExecutor, read: Read, layer: int, sums: Sums | None
    ) -> list[Future[Array]]:
        if layer == self.config.num_layers:
            return []
        return self._block.fetch(pool, read, f"blocks.{layer}.", sums)

    def _paths(self) -> list[str]:
        first = "blocks.0."
        ends = [path for path in self._shapes if not path.startswith(first)]
        inner = [path.removeprefix(first) for path in self._shapes if path.startswith(first)]
        blocks = [f"blocks.{i}.{path}" for i in range(self.config.num_layers) for path in inner]
        return ends + blocks
