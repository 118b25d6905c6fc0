"""Sizes that are timed, and how, for programs without JAX too."""

from __future__ import annotations

import math

# Inputs are rotated, so that what one call read is gone from the cache when its turn comes again.
ROTATED_BYTES = 160e6
# Calls of a program, where their inputs are small: starting it takes the host some 0.1 ms, which
# calls of a few microseconds must outlast together.
ENOUGH_SETS, ENOUGH_BYTES = 24, 500e6

# A card at its limit of power slows down over the first tenths of a second, and products differ in
# what power they take. Each is timed in the state that it brings the card to, as in a model whose
# products are all alike.
WARM_SECONDS = 0.3

# (tokens, inputs, outputs): the products of one step of a 12-billion image transformer at
# 1024 x 1024, its modulation, and a size for a CPU.
MANY = tuple(
    (4608, k, n)
    for k, n in (
        (3072, 9216),
        (3072, 3072),
        (3072, 12288),
        (12288, 3072),
        (3072, 21504),
        (15360, 3072),
    )
)
FEW = tuple((m, k, n) for m in (1, 16) for k, n in ((3072, 18432), (3072, 9216)))
SMALL = ((256, 512, 512),)


def input_sets(nbytes: float) -> int:
    """How many sets of inputs of `nbytes` to rotate."""
    nbytes = max(nbytes, 1)
    past_the_cache = max(2, math.ceil(ROTATED_BYTES / nbytes))
    return min(max(past_the_cache, int(ENOUGH_BYTES / nbytes)), ENOUGH_SETS)


def sets_of(m: int, k: int, n: int) -> int:
    """How many sets of (m, k) activations, in 16 bits and in 8, with packed (n, k) weights."""
    return input_sets(n * k / 4 + 3 * m * k)
