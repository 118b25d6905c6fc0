"""What makes a kernel fit for `jax.vmap` and `jax.grad`, which know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def foldable(
    compute: Callable[..., Any], per_row: tuple[int, ...], per_run: tuple[int, ...] = ()
) -> Any:
    """`compute`, whose batches become more rows.

    Args:
      compute: takes arrays and Nones, returns arrays with as many rows as the first has.
      per_row: which arguments have a row for each row of the result. A batch of any other is
        worked through one by one.
      per_run: which have a row for each of several equal runs of the result's rows, or one row for
        them all.
    """
    folded = jax.custom_batching.custom_vmap(compute)

    @folded.def_vmap
    def _(size: int, batched: Any, *arrays: Any) -> Any:
        def spread(index: int) -> Any:
            array = arrays[index]
            if array is None or batched[index]:
                return array
            return jnp.broadcast_to(array, (size, *array.shape))

        def folds(index: int) -> bool:
            shared = arrays[index] is not None and not batched[index] and len(arrays[index]) == 1
            return index in per_row or (index in per_run and not shared)

        every = range(len(arrays))
        if any(batched[index] for index in every if index not in per_row + per_run):
            y = one_by_one(folded, [spread(index) for index in every], size)
        else:
            rows = arrays[0].shape[1] if batched[0] else arrays[0].shape[0]
            more = [merge(spread(i)) if folds(i) else arrays[i] for i in every]
            y = jax.tree.map(lambda part: part.reshape(size, rows, *part.shape[1:]), folded(*more))
        return y, jax.tree.map(lambda _: True, y)

    return folded


def one_by_one(compute: Callable[..., Any], batches: list[Any], size: int) -> Any:
    """`compute` of each element of the batches; a batch of one needs no loop."""
    if size == 1:
        single = compute(*(None if batch is None else batch[0] for batch in batches))
        return jax.tree.map(lambda part: part[None], single)
    return jax.lax.map(lambda one: compute(*one), tuple(batches))


def merge(array: Any) -> Any:
    """The two leading axes as one; None stays None."""
    if array is None:
        return None
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def differentiable(compute: Callable[..., Any], like: Callable[..., Any]) -> Any:
    """`compute` with the gradient of `like`, in all floating arguments."""

    @jax.custom_vjp
    def product(*arrays: Any) -> Any:
        return compute(*arrays)

    def forward(*arrays: Any) -> tuple[Any, Any]:
        return product(*arrays), arrays

    def backward(arrays: Any, grad: Any) -> tuple[Any, ...]:
        floating = [
            index
            for index, array in enumerate(arrays)
            if array is not None and jnp.issubdtype(array.dtype, jnp.floating)
        ]

        def of_floating(*values: Any) -> Any:
            full = list(arrays)
            for index, value in zip(floating, values, strict=True):
                full[index] = value
            return like(*full)

        grads = jax.vjp(of_floating, *(arrays[index] for index in floating))[1](grad)
        every: list[Any] = [None] * len(arrays)
        for index, value in zip(floating, grads, strict=True):
            every[index] = value
        return tuple(every)

    product.defvjp(forward, backward)
    return product
