"""Linears by name, and their exchange."""

from __future__ import annotations

from flux_jax.components import abstract_module
from flux_jax.configs import FluxConfig
from flux_jax.linears import linears, replace_linears


def test_names_are_in_block_order():
    blocks = [
        name.split(".")[1]
        for name in linears(abstract_module("transformer", FluxConfig.dev()))
        if name.startswith("single_blocks")
    ]
    assert [int(block) for block in blocks] == sorted(int(block) for block in blocks)


def test_replace_in_lists_and_attributes():
    module = abstract_module("transformer", FluxConfig.tiny())
    seen = []

    def make(name, linear):
        seen.append((name, linear.weight.shape))
        linear.marked = True
        return linear

    replace_linears(module, ["double_blocks.2.img_mlp.out_layer", "img_in"], make)
    assert seen == [("double_blocks.2.img_mlp.out_layer", (256, 1024)), ("img_in", (256, 64))]
    assert module.double_blocks[2].img_mlp.out_layer.marked
