"""What one step with ternary weights must compute and move, and the time that takes at best.

    python -m benchmarks.budget                  # W1.58A8; --bits 16 for W1.58A16

Every kind of operation of a step with hoisted modulations, as `ternary.fused` and the kernels
compute it, with its bytes and operations, at rates that were measured alone on one H200 (`Rates`).
A profile is held against this; it is not a measurement of a step.

Symbols: C hidden size, F MLP width, m rows.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from benchmarks.common import run
from benchmarks.paper import Product, Step, attention_flops, products
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured alone at FLUX.1's shapes on one H200, a call at a time.

    Attributes:
      int8, bf16: operations a second of XLA's dense products, in the middle of the six shapes.
      attention: of cuDNN in bfloat16.
      bytes: a second, of a pass over arrays that the cache does not hold.
    """

    int8: float = 1.46e15
    bf16: float = 7.5e14
    attention: float = 5.49e14
    bytes: float = 4.0e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """`count` operations of one kind in a step.

    Attributes:
      name: what it computes.
      kind: product, attention or pass.
      count: how many there are.
      bytes: read and written by one.
      operations: of one, two per multiply and add; 0 for a pass, which is bound by its bytes.
      rate: operations a second.
    """

    name: str
    kind: str
    count: int
    bytes: float
    operations: float = 0.0
    rate: float = 1.0

    def seconds(self, rates: Rates) -> float:
        """The time of all of them: by operations or by bytes, whichever takes longer."""
        return self.count * max(self.bytes / rates.bytes, self.operations / self.rate)


def operations(
    config: FluxConfig, step: Step, *, activation_bits: int, rates: Rates | None = None
) -> list[Operation]:
    """Every kind of operation between a step's input tokens and its velocity.

    Args:
      config: of the transformer.
      step: its size.
      activation_bits: 8 or 16.
      rates: by default those of one H200.
    """
    rates = rates or Rates()
    width, mlp = config.hidden_size, config.mlp_hidden
    item = activation_bits // 8
    tokens = {"img": step.batch * step.image_tokens, "txt": step.batch * step.text_tokens}
    joined, depth, singles = step.batch * step.tokens, config.depth, config.depth_single_blocks
    blocks = depth + singles

    def passing(name: str, count: int, rows: int, read: float, write: float) -> Operation:
        """Reads and writes bytes for each row."""
        return Operation(name=name, kind="pass", count=count, bytes=rows * (read + write))

    listed = []
    for product in products(config, step):
        if not product.name.endswith("modulation"):
            listed.append(_product(product, activation_bits, rates))
    norm = "norm, modulation" + ", int8" * (item == 1)
    for stream, rows in tokens.items():
        listed.append(passing(f"{stream} {norm}", 2 * depth, rows, 2 * width, item * width))
        listed.append(
            passing(f"{stream} GELU{', int8' * (item == 1)}", depth, rows, 2 * mlp, item * mlp)
        )
        if item == 1:
            name = f"{stream} attention's output to int8"
            listed.append(passing(name, depth, rows, 2 * width, width))
    listed.append(passing(f"single {norm}", singles, joined, 2 * width, item * width))
    listed.append(
        passing(
            f"GELU, joined{', int8' * (item == 1)}",
            singles,
            joined,
            2 * (width + mlp),
            item * (width + mlp),
        )
    )
    # q, k and v are read from the product and written as the attention wants them.
    listed.append(passing("norm and rotation of q, k", blocks, joined, 6 * width, 6 * width))
    listed.append(
        Operation(
            name="attention",
            kind="attention",
            count=blocks,
            bytes=8.0 * joined * width,
            operations=attention_flops(config, step) / blocks,
            rate=rates.attention,
        )
    )
    return listed


def _product(product: Product, activation_bits: int, rates: Rates) -> Operation:
    """One product with a packed weight; a gated residual is read by those that end a branch."""
    residual = 2 if product.name.endswith(("proj", "mlp out", "linear2")) else 0
    activations = product.m * (product.k * activation_bits / 8 + product.n * (2 + residual))
    return Operation(
        name=product.name,
        kind="product",
        count=product.count,
        bytes=activations + product.n * product.k / 4,
        operations=product.flops / product.count,
        rate=rates.int8 if activation_bits == 8 else rates.bf16,
    )


def table(listed: list[Operation], rates: Rates) -> list[str]:
    """Markdown: each kind with its times, the sums by kind, and their total."""
    lines = [
        "| operation | number | MB each | GOP each | us each | ms a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in sorted(listed, key=lambda o: -o.seconds(rates)):
        seconds = one.seconds(rates)
        operations = f"{one.operations / 1e9:.1f}" if one.operations else ""
        lines.append(
            f"| {one.name} | {one.count} | {one.bytes / 1e6:.1f} | {operations} "
            f"| {1e6 * seconds / one.count:.1f} | {1e3 * seconds:.2f} |"
        )
    kinds = {"product": "all products", "attention": "attention", "pass": "all passes between"}
    sums = {kind: sum(o.seconds(rates) for o in listed if o.kind == kind) for kind in kinds}
    for kind, name in kinds.items():
        lines.append(f"| **{name}** | | | | | **{1e3 * sums[kind]:.2f}** |")
    lines.append(f"| **a step** | | | | | **{1e3 * sum(sums.values()):.2f}** |")
    return lines


def main(
    bits: Annotated[int, typer.Option(help="Of the activations: 8 or 16.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
) -> None:
    """Print the budget of one step of FLUX.1-dev at 1024 x 1024."""
    if bits not in (8, 16):
        raise UserError(f"--bits must be 8 or 16, got {bits}")
    rates = Rates()
    listed = operations(FluxConfig.dev(), Step(batch=batch), activation_bits=bits, rates=rates)
    print("\n".join(table(listed, rates)))


if __name__ == "__main__":
    run(main)
