import dataclasses

import jax
import pytest
from flax import nnx

from benchmarks import paper
from flux_jax.configs import FluxConfig
from flux_jax.transformer import FluxTransformer

# Full width; few blocks, since tracing all 57 takes long.
CONFIGS = {
    "dev": dataclasses.replace(FluxConfig.dev(), depth=2, depth_single_blocks=3),
    "schnell": dataclasses.replace(FluxConfig.schnell(), depth=1, depth_single_blocks=2),
    "tiny": FluxConfig.tiny(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_the_models(name):
    config = CONFIGS[name]
    model = nnx.eval_shape(lambda: FluxTransformer(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert paper.parameter_count(config) == sum(leaf.size for leaf in leaves)


def test_full_size_figures():
    """Counted independently: 11.9 B parameters, 59.5 + 14.9 TFLOP at 1024 x 1024."""
    config, step = FluxConfig.dev(), paper.Step()
    linears = sum(p.flops for p in paper.products(config, step) if p.m > 1)
    assert paper.parameter_count(config) == 11_901_408_320
    assert linears == pytest.approx(59.5e12, rel=1e-3)
    assert paper.attention_flops(config, step) == pytest.approx(14.9e12, rel=2e-3)


def test_products_agree_with_xlas_count():
    """XLA's own count of a compiled step is ours plus embedders, final layer and pointwise work."""
    config, step = FluxConfig.tiny(), paper.Step(image_tokens=64, text_tokens=48)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: FluxTransformer(config, rngs=nnx.Rngs(0))))

    def shape(*dims, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(dims, dtype)

    inputs = (
        shape(1, 64, 64),
        shape(64, 3, dtype="int32"),
        shape(1, 48, 128),
        shape(48, 3, dtype="int32"),
        shape(1, dtype="float32"),
        shape(1, 128),
        shape(1, dtype="float32"),
    )
    run = jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(*inputs))
    counted = run.lower(state, inputs).cost_analysis()["flops"]
    ours = sum(p.flops for p in paper.products(config, step)) + paper.attention_flops(config, step)
    assert ours <= counted <= 1.05 * ours


def test_activations_scale_with_the_batch_and_stay_small():
    config = FluxConfig.dev()
    one = sum(paper.activation_bytes(config, paper.Step()).values())
    two = sum(paper.activation_bytes(config, paper.Step(batch=2)).values())
    assert 1.9 * one < two < 2 * one
    assert one < 0.02 * 2 * paper.parameter_count(config)
    assert paper.step_bytes(config, paper.Step()) == 2 * paper.parameter_count(config) + one
