from pathlib import Path

import pytest

from benchmarks import budget, paper
from flux_jax.configs import FluxConfig

DEV = FluxConfig.dev()
DOCS = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


@pytest.mark.parametrize("bits", [8, 16])
def test_products_and_attention_are_the_papers(bits):
    step = paper.Step(batch=2)
    listed = budget.operations(DEV, step, activation_bits=bits)
    counted = {kind: 0.0 for kind in ("product", "attention", "pass")}
    for one in listed:
        counted[one.kind] += one.count * one.operations
    linears = sum(p.flops for p in paper.products(DEV, step) if "modulation" not in p.name)
    assert counted["product"] == linears
    assert counted["attention"] == pytest.approx(paper.attention_flops(DEV, step))
    assert counted["pass"] == 0


def test_bytes_by_hand():
    """4608 tokens of width 3072: bf16 in, int8 out; the joined 15360; q, k, v there and back."""
    step = paper.Step()
    listed = {o.name: o for o in budget.operations(DEV, step, activation_bits=8)}
    assert listed["single norm, modulation, int8"].bytes == 4608 * 3072 * 3
    assert listed["GELU, joined, int8"].bytes == 4608 * 15360 * 3
    assert listed["norm and rotation of q, k"].bytes == 4608 * 3 * 3072 * 4
    # int8 activations, 2-bit weights, bf16 result and residual.
    linear2 = 4608 * 15360 + 15360 * 3072 / 4 + 4608 * 3072 * 4
    assert listed["linear2"].bytes == linear2


def test_a_pass_is_bound_by_bytes_and_a_product_by_whichever_is_longer():
    rates = budget.Rates()
    passing = budget.Operation(name="x", kind="pass", count=2, bytes=8e9)
    assert passing.seconds(rates) == 16e9 / rates.bytes
    small = budget.Operation(
        name="x", kind="product", count=1, bytes=1e9, operations=1e9, rate=rates.int8
    )
    assert small.seconds(rates) == 1e9 / rates.bytes


@pytest.mark.parametrize("bits", [8, 16])
def test_the_table_of_the_documentation_is_this(bits):
    rates = budget.Rates()
    listed = budget.operations(DEV, paper.Step(), activation_bits=bits, rates=rates)
    lines = budget.table(listed, rates)
    wanted = lines if bits == 8 else lines[-4:]
    assert "\n".join(wanted) in DOCS.read_text(encoding="utf-8")
