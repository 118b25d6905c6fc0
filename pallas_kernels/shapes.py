"""Sizes that are timed, for programs without JAX too."""

from __future__ import annotations

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
