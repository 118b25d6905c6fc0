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
from collections.abc import Iterator
from contextvars import ContextVar

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
        self, q: Float[Array, "B l H D"], k: Float[Array, "B l H D"], v: Float[Array, "B l H D"]
    ) -> tuple[Float[Array, "B L h D"], Float[Array, "B L h D"], Float[Array, "B L h D"]]:
        """From some tokens of all heads to all tokens of some heads: all text, then all image."""
        # One exchange in place of three: what it costs beside its bytes is paid once.
        mine = jnp.stack((q, k, v))
        parts = jax.lax.all_to_all(mine, AXIS, split_axis=3, concat_axis=2, tiled=True)
        parts = parts.reshape(*mine.shape[:2], -1, mine.shape[2], *parts.shape[3:])
        text, image = parts[:, :, :, : self.text], parts[:, :, :, self.text :]
        joined = jnp.concatenate([_merged(text, 2), _merged(image, 2)], axis=2)
        return joined[0], joined[1], joined[2]

    def to_tokens(self, x: Float[Array, "B L h D"]) -> Float[Array, "B l H D"]:
        """The way back."""
        devices = jax.lax.axis_size(AXIS)
        batch, _, heads, width = x.shape
        whole = devices * self.text
        text = x[:, :whole].reshape(batch, devices, -1, heads, width)
        image = x[:, whole:].reshape(batch, devices, -1, heads, width)
        parts = _merged(jnp.concatenate((text, image), axis=2), 1)
        return jax.lax.all_to_all(parts, AXIS, split_axis=1, concat_axis=2, tiled=True)


def _merged(x: Float[Array, ...], axis: int) -> Float[Array, ...]:
    """Two neighbouring axes made one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


_here: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def exchange() -> Exchange | None:
    """How attention finds the other tokens where it is traced; None where it has all."""
    return _here.get()


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
