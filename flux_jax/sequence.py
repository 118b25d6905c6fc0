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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AXIS = "sequence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How the tokens of a joined sequence lie on the devices of `AXIS`.

    Attributes:
      text: tokens of a device that are text; they come before its image tokens.
    """

    text: int

    def to_heads(
        self,
        q: Float[Array, "B l H D"],
        k: Float[Array, "B l H D"],
        v: Float[Array, "B l H D"],
        meanwhile: Any,
    ) -> tuple[tuple[Float[Array, "B L h D"], ...], Any]:
        """From some tokens of all heads to all tokens of some heads: all text, then all image.

        Args:
          q, k, v: of the device's tokens.
          meanwhile: arrays, or none, to compute while they are on their way.

        Returns:
          q, k and v of the device's heads, and `meanwhile`.
        """
        # One exchange in place of three: what it costs beside its bytes is paid once. The device
        # that something goes to, or comes from, is the first axis: otherwise XLA inserts a
        # transpose.
        parts = jax.lax.all_to_all(self._for_each(jnp.stack((q, k, v)), 3), AXIS, 0, 0, tiled=True)
        # What reads the parts waits for both, so that the exchange is begun first and ended last.
        parts, meanwhile = jax.lax.optimization_barrier((parts, meanwhile))
        text, image = parts[..., : self.text, :, :], parts[..., self.text :, :, :]
        joined = jnp.concatenate([_merged(jnp.moveaxis(x, 0, 2), 2) for x in (text, image)], axis=2)
        return (joined[0], joined[1], joined[2]), meanwhile

    def to_tokens(self, x: Float[Array, "B L h D"]) -> Float[Array, "B l H D"]:
        """The way back."""
        whole = jax.lax.axis_size(AXIS) * self.text
        parts = (self._for_each(some, 1) for some in (x[:, :whole], x[:, whole:]))
        parts = jnp.concatenate(tuple(parts), axis=2)
        parts = jax.lax.all_to_all(parts, AXIS, 0, 0, tiled=True)
        return _merged(jnp.moveaxis(parts, 0, 2), 2)

    @staticmethod
    def _for_each(x: Array, axis: int) -> Array:
        """An axis cut into a part for each device, the devices first."""
        devices = jax.lax.axis_size(AXIS)
        cut = x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(cut, axis, 0)


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
    q: Float[Array, "B l H D"],
    k: Float[Array, "B l H D"],
    v: Float[Array, "B l H D"],
    meanwhile: Any = None,
) -> tuple[Float[Array, "B l H D"], Any]:
    """`attend(q, k, v)`, to all tokens wherever they are.

    Args:
      attend: an attention of whole sequences, each head by itself.
      q, k, v: of the tokens at hand.
      meanwhile: arrays that take nothing of other tokens: computed while those are sent.

    Returns:
      The result for the tokens at hand, and `meanwhile`.
    """
    exchange = _here.get()
    if exchange is None:
        return attend(q, k, v), meanwhile
    heads, meanwhile = exchange.to_heads(q, k, v, meanwhile)
    return exchange.to_tokens(attend(*heads)), meanwhile


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
