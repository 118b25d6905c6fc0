"""The least a step can take on this device: its products and its attention, each timed alone.

In bf16, or with the products in int8 (s8 x s8 to s32): what a ternary step with 8-bit activations
could reach at most, and without the modulation, which is computed before the loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.common import median_seconds
from benchmarks.paper import Product, Step, attention_flops, products
from flux_jax.attention import attention
from flux_jax.configs import FluxConfig

# Bytes of outputs kept alive by one timed call; enough repetitions to hide the launch of it.
_OUTPUT_BYTES = 1 << 31
_MAX_REPETITIONS = 16


def product_seconds(product: Product, key: jax.Array, *, int8: bool = False) -> float:
    """Time of one (M, K) x (N, K)^T product of random matrices, out of several in a row.

    Every repetition has operands of its own: XLA would merge products that share one, and the
    small ones would be timed out of the cache.
    """
    itemsize = 4 if int8 else 2
    fitting = _OUTPUT_BYTES // (itemsize * product.m * product.n)
    repetitions = max(2, min(_MAX_REPETITIONS, fitting))

    def draw(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if int8:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
        return jax.random.normal(key, shape, jnp.bfloat16)

    @jax.jit
    def operands(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        pairs = jax.random.split(key, (repetitions, 2))
        shapes = (product.m, product.k), (product.n, product.k)
        return [(draw(one, shapes[0]), draw(other, shapes[1])) for one, other in pairs]

    @jax.jit
    def multiply(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        contract = (((1,), (1,)), ((), ()))
        result = jnp.int32 if int8 else jnp.bfloat16
        return [
            jax.lax.dot_general(x, w, contract, preferred_element_type=result) for x, w in pairs
        ]

    seconds = median_seconds(
        multiply, [(operands(key),)], wait=jax.block_until_ready, repeats=10, calls=3
    )
    return seconds / repetitions


def attention_seconds(config: FluxConfig, step: Step, key: jax.Array) -> float:
    """Time of one attention over all tokens in bf16, by the implementation the model uses."""
    repetitions = 4
    shape = (step.batch, step.tokens, config.num_heads, config.head_dim)

    @jax.jit
    def operands(key: jax.Array) -> list[list[jax.Array]]:
        keys = jax.random.split(key, (repetitions, 3))
        return [[jax.random.normal(k, shape, jnp.bfloat16) for k in triple] for triple in keys]

    @jax.jit
    def attend(sets: list[list[jax.Array]]) -> list[jax.Array]:
        return [attention(q, k, v) for q, k, v in sets]

    seconds = median_seconds(
        attend, [(operands(key),)], wait=jax.block_until_ready, repeats=10, calls=3
    )
    return seconds / repetitions


def measure(config: FluxConfig, step: Step, *, int8: bool = False) -> dict[str, float]:
    """Milliseconds per step of every product and of the attention, by name, with their sum.

    Args:
      config: of the transformer.
      step: what is asked of it.
      int8: whether the products are in int8; the modulation's are then left out.

    Returns:
      "<product>" for each of `paper.products`, "attention", and "total".
    """
    key = jax.random.key(7, impl="rbg")
    floors = {}
    print(f"  {'product':18} {'M':>5} {'K':>6} {'N':>6} {'x':>3} {'ms':>8} {'TFLOP/s':>8}")
    wanted = [p for p in products(config, step) if not (int8 and p.name.endswith("modulation"))]
    for index, product in enumerate(wanted):
        seconds = product_seconds(product, jax.random.fold_in(key, index), int8=int8)
        floors[product.name] = 1e3 * seconds * product.count
        rate = product.flops / product.count / seconds / 1e12
        print(
            f"  {product.name:18} {product.m:5} {product.k:6} {product.n:6} {product.count:3} "
            f"{1e3 * seconds:8.4f} {rate:8.1f}"
        )
    blocks = config.depth + config.depth_single_blocks
    seconds = attention_seconds(config, step, jax.random.fold_in(key, 1000))
    floors["attention"] = 1e3 * seconds * blocks
    rate = attention_flops(config, step) / blocks / seconds / 1e12
    print(f"  {'attention':18} {'':24}{1e3 * seconds:8.4f} {rate:8.1f}")
    floors["total"] = sum(floors.values())
    return floors
