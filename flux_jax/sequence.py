"""One image over several devices: each has a part of the tokens, and attention exchanges them.

All but attention treats a token by itself, with whole weights. For attention each device gives away
its tokens' queries, keys and values of most heads and receives those of all tokens for its own
heads: one all-to-all there and one back (Ulysses, arXiv:2309.14509). A head then sees all tokens on
one device, by the same kernel and in the same order as if it were alone.

Why not a ring (arXiv:2310.01889): of L tokens of width C on n devices, a device sends 4 L C / n
numbers a block here, and 2 (n - 1) L C / n there. `docs/scaling.md` has the times.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AXIS = "sequence"
# Left to an exchange by what is computed meanwhile: NCCL has a block of threads for each of its 32
# channels, and none of those shares a multiprocessor with a product's. With none left the exchange
# begins when the product ends. With half the channels it takes longer than the product.
EXCHANGE_MULTIPROCESSORS = 32


@runtime_checkable
class HeadLayouts(Protocol):
    """Queries, keys and values of the tokens at hand, in the layout that is asked for."""

    def apart(self) -> tuple[Float[Array, "B l H D"], ...]:
        """q, k and v."""
        ...

    def grouped(self, groups: int) -> Float[Array, "G 3 B l h D"]:
        """q, k and v of each of some groups of heads."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How the tokens of a joined sequence lie on the devices of `AXIS`.

    Attributes:
      text: tokens of a device that are text; they come before its image tokens.
    """

    text: int

    def to_heads(
        self, sent: Float[Array, "n 3 B l h D"], meanwhile: Any
    ) -> tuple[tuple[Float[Array, "B L h D"], ...], Any]:
        """From some tokens of all heads to all tokens of some heads.

        Args:
          sent: q, k and v of the device's tokens; first, the device whose heads they are.
          meanwhile: arrays, or none, to compute while they are on their way.

        Returns:
          q, k and v of the device's heads, and `meanwhile`. Queries lie one device's after the
          other's, so that the way back finds them together. Keys and values lie as on one device,
          all text and then all image: in another order their sums would be rounded anew.
        """
        # One exchange in place of three: what it costs beside its bytes is paid once.
        parts = jax.lax.all_to_all(sent, AXIS, 0, 0, tiled=True)
        # What reads the parts waits for both, so that the exchange is begun first and ended last.
        parts, meanwhile = jax.lax.optimization_barrier((parts, meanwhile))
        q = _merged(jnp.moveaxis(parts[:, 0], 0, 1), 1)
        text, image = parts[:, 1:, :, : self.text], parts[:, 1:, :, self.text :]
        joined = jnp.concatenate([_merged(jnp.moveaxis(x, 0, 2), 2) for x in (text, image)], axis=2)
        return (q, joined[0], joined[1]), meanwhile

    @staticmethod
    def to_tokens(x: Float[Array, "B L h D"]) -> Float[Array, "B l H D"]:
        """The way back."""
        devices = jax.lax.axis_size(AXIS)
        parts = jnp.moveaxis(x.reshape(x.shape[0], devices, -1, *x.shape[2:]), 1, 0)
        parts = jax.lax.all_to_all(parts, AXIS, 0, 0, tiled=True)
        return _merged(jnp.moveaxis(parts, 0, 2), 2)


def _merged(x: Float[Array, ...], axis: int) -> Float[Array, ...]:
    """Two neighbouring axes made one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


_here: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def exchange_here() -> Exchange | None:
    """How the tokens lie, where this is traced; None if all of them are at hand.

    What is traced once and called again depends on it: it must be part of the key.
    """
    return _here.get()


def is_split() -> bool:
    """Whether, where this is traced, the tokens at hand are a part of them."""
    return exchange_here() is not None


def over_all_tokens(
    attend: Callable[..., Float[Array, "B L h D"]],
    heads: HeadLayouts,
    meanwhile: Any = None,
) -> tuple[Float[Array, "B l H D"], Any]:
    """`attend(q, k, v)`, to all tokens wherever they are.

    Args:
      attend: an attention of whole sequences, each head and each query by itself.
      heads: of the tokens at hand.
      meanwhile: arrays that take nothing of other tokens: computed while those are sent.

    Returns:
      The result for the tokens at hand, and `meanwhile`.
    """
    exchange = _here.get()
    if exchange is None:
        return attend(*heads.apart()), meanwhile
    sent = heads.grouped(jax.lax.axis_size(AXIS))
    every, meanwhile = exchange.to_heads(sent, meanwhile)
    return exchange.to_tokens(attend(*every)), meanwhile


@contextlib.contextmanager
def tokens_of_a_part(text: int) -> Iterator[None]:
    """While the blocks are traced: they may be given a part of the tokens.

    It acts inside a `jax.shard_map` over `AXIS` and nowhere else.

    Args:
      text: tokens of the part that are text.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = AXIS in mesh.manual_axes and mesh.shape[AXIS] > 1
    token = _here.set(Exchange(text=text) if split else None)
    try:
        yield
    finally:
        _here.reset(token)
