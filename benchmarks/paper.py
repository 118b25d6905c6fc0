"""What one step of the FLUX.1 transformer must compute and hold, counted on paper.

Symbols: C hidden size, F MLP width, T and I text and image tokens, L = T + I, B batch.
"""

from __future__ import annotations

import dataclasses

from flux_jax.configs import FluxConfig

_TIME_CHANNELS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The size of one step: what is asked of the transformer."""

    image_tokens: int = 4096
    text_tokens: int = 512
    batch: int = 1

    @property
    def tokens(self) -> int:
        """L, of one image."""
        return self.image_tokens + self.text_tokens


# By name: FLUX.1-dev at 1024 x 1024, and the shipped model.
SIZES = {
    "full": (FluxConfig.dev(), Step()),
    "tiny": (FluxConfig.tiny(), Step(image_tokens=64, text_tokens=48)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """`count` products (M, K) x (K, N) of one step."""

    name: str
    m: int
    k: int
    n: int
    count: int

    @property
    def flops(self) -> float:
        """Operations of all `count` of them, two per multiply and add."""
        return 2.0 * self.m * self.k * self.n * self.count


def products(config: FluxConfig, step: Step) -> list[Product]:
    """Every linear of the blocks, once per distinct shape and stream.

    The embedders and the final layer are left out: 0.1 % of the arithmetic.
    """
    width, mlp = config.hidden_size, config.mlp_hidden
    rows = {"img": step.batch * step.image_tokens, "txt": step.batch * step.text_tokens}
    depth, singles, joined = config.depth, config.depth_single_blocks, step.batch * step.tokens
    listed = []
    for stream, m in rows.items():
        listed += [
            Product(name=f"{stream} qkv", m=m, k=width, n=3 * width, count=depth),
            Product(name=f"{stream} proj", m=m, k=width, n=width, count=depth),
            Product(name=f"{stream} mlp in", m=m, k=width, n=mlp, count=depth),
            Product(name=f"{stream} mlp out", m=m, k=mlp, n=width, count=depth),
        ]
    vector = step.batch
    return [
        *listed,
        Product(name="linear1", m=joined, k=width, n=3 * width + mlp, count=singles),
        Product(name="linear2", m=joined, k=width + mlp, n=width, count=singles),
        Product(name="double modulation", m=vector, k=width, n=6 * width, count=2 * depth),
        Product(name="single modulation", m=vector, k=width, n=3 * width, count=singles),
    ]


def attention_flops(config: FluxConfig, step: Step) -> float:
    """Scores and weighted sum of every block: 4 * B * L^2 * C each."""
    blocks = config.depth + config.depth_single_blocks
    return 4.0 * step.batch * step.tokens**2 * config.hidden_size * blocks


def parameter_count(config: FluxConfig) -> int:
    """Weights, biases and QK-norm scales of the whole transformer."""
    width, mlp, head = config.hidden_size, config.mlp_hidden, config.head_dim

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def embedder(inputs: int) -> int:
        return linear(inputs, width) + linear(width, width)

    stream = (
        linear(width, 6 * width)
        + linear(width, 3 * width)
        + 2 * head
        + linear(width, width)
        + linear(width, mlp)
        + linear(mlp, width)
    )
    single = (
        linear(width, 3 * width)
        + linear(width, 3 * width + mlp)
        + linear(width + mlp, width)
        + 2 * head
    )
    ends = (
        linear(config.in_channels, width)
        + linear(config.context_in_dim, width)
        + embedder(_TIME_CHANNELS) * (2 if config.guidance_embed else 1)
        + embedder(config.vec_in_dim)
        + linear(width, 2 * width)
        + linear(width, config.in_channels)
    )
    return config.depth * 2 * stream + config.depth_single_blocks * single + ends


def activation_bytes(config: FluxConfig, step: Step, itemsize: int = 2) -> dict[str, int]:
    """What lives at the widest point of a step without gradients, beside the weights.

    Only one block is alive at a time. The widest point is the start of `linear2` of a single block,
    whose inputs and output are all needed at once; per token, in units of C (F = 4 C in FLUX.1):

        residual stream x                   C
        linear1's output: q, k, v, hidden   3 C + F    (one buffer until GELU has read `hidden`)
        [attention's output, gelu(hidden)]  C + F      (the concatenation that linear2 reads)
        attention's output                  C          (until it has been copied there)
        linear2's output                    C

    Rotated q and k (2 C) are dead by then, and at the attention, where they are not, the
    concatenation is not there yet: C + (3 C + F) + 2 C + C is less. A compiler that writes q, k and
    the concatenation in place needs less, one that keeps intermediates in float32 more.

    Beside them, alive through the step: the modulation vectors of all blocks, the rotary cosines
    and sines in float32, the inputs and the output.

    Returns:
      Bytes by name.
    """
    width, mlp, tokens = config.hidden_size, config.mlp_hidden, step.batch * step.tokens
    image, text = step.batch * step.image_tokens, step.batch * step.text_tokens
    vectors = config.depth * 12 + config.depth_single_blocks * 3 + 2
    return {
        "block": itemsize * tokens * (width + (3 * width + mlp) + (width + mlp) + 2 * width),
        "modulation": itemsize * step.batch * vectors * width,
        "rotary": 4 * step.tokens * config.head_dim,
        "inputs and output": itemsize
        * (2 * image * config.in_channels + text * config.context_in_dim),
    }


def step_bytes(config: FluxConfig, step: Step, itemsize: int = 2) -> int:
    """Weights plus activations: what one step must hold on the device at its peak."""
    weights = itemsize * parameter_count(config)
    return weights + sum(activation_bytes(config, step, itemsize).values())
