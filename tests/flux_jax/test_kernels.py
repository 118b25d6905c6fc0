"""The choice of kernels for a whole transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.components import abstract_module
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.kernels import leave_to_xla, use_kernels
from flux_jax.linears import linears, replace_linears
from flux_jax.pipeline import FluxPipeline
from flux_jax.sharding import make_mesh, spread
from ternary.config import QuantConfig
from ternary.layers import TernaryLinear
from ternary.policy import Policy, select
from tests.random_module import random_module
from tests.small_pipeline import TRANSFORMER, VAE, small_pipeline


@pytest.fixture(scope="module")
def model():
    made = random_module("transformer", TRANSFORMER, jnp.bfloat16)
    names = select(list(linears(made)), Policy())
    replace_linears(made, names, lambda _, one: TernaryLinear.from_linear(one, QuantConfig()))
    return made


def heads_backends(transformer):
    blocks = [*transformer.double_blocks, *transformer.single_blocks]
    return {block.heads_backend for block in blocks}


def test_every_layer_is_told_and_programs_are_others(model):
    use_kernels(model)
    before = nnx.split(model)[0]
    use_kernels(model, kernels="jax", attention_by="xla_fp8")
    layers = linears(model, TernaryLinear).values()
    assert {layer.backend for layer in layers} == {"jax"}
    blocks = [*model.double_blocks, *model.single_blocks]
    assert {block.attention for block in blocks} == {"xla_fp8"}
    assert heads_backends(model) == {"jax"}
    # The structure is what a compiled program is found by.
    assert nnx.split(model)[0] != before
    use_kernels(model)
    assert nnx.split(model)[0] == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"kernels": "cutlass"}, "kernels must be one of mosaic, triton, jax, got 'cutlass'"),
        ({"attention_by": "flash"}, "attention must be one of cudnn, .*, got 'flash'"),
        ({"kernels": "mosaic"}, "kernels='mosaic' cannot run here: it needs an NVIDIA GPU"),
        ({"attention_by": "cudnn_fp8"}, "attention='cudnn_fp8' cannot run here: it needs an NVI"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_changes(model, choice, message):
    use_kernels(model, kernels="jax")
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU may run it")
    with pytest.raises(UserError, match=message):
        use_kernels(model, **choice)
    assert {layer.backend for layer in linears(model, TernaryLinear).values()} == {"jax"}


def spread_copy(model, **axes):
    copy = nnx.clone(model)
    spread(copy, make_mesh(**axes))
    return copy


def test_split_weights_are_left_to_plain_jax(model):
    use_kernels(model)
    split = spread_copy(model, tensor=2)
    use_kernels(split)
    assert {layer.backend for layer in linears(split, TernaryLinear).values()} == {"jax"}
    with pytest.raises(UserError, match="cannot run on weights that are split over fsdp or tensor"):
        use_kernels(split, kernels="mosaic")
    # Each device has all weights, and kernels of its own.
    whole = spread_copy(model, data=2, sequence=2)
    use_kernels(whole)
    assert {layer.backend for layer in linears(whole, TernaryLinear).values()} == {None}
    with pytest.raises(UserError, match="kernels='mosaic' cannot run here: it needs an NVIDIA GPU"):
        use_kernels(whole, kernels="mosaic")


def pipeline_of(transformer):
    vae = abstract_module("vae", VAE)
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=SchedulerConfig.dev())


def test_a_pipeline_of_parts_on_a_mesh_suits_it(model):
    """However the weights came to be split: `generate --mesh tensor=2` loads them so."""
    use_kernels(model)
    split = spread_copy(model, tensor=2)
    pipeline_of(split)
    assert {layer.backend for layer in linears(split, TernaryLinear).values()} == {"jax"}
    assert heads_backends(split) == {"jax"}


def test_a_pipeline_of_parts_takes_the_kernels_that_a_loaded_one_takes():
    """`generate` makes its own of parts, and compiles ahead for shapes alone."""
    loaded = random_module("transformer", TRANSFORMER, jnp.bfloat16)
    assert heads_backends(pipeline_of(loaded).transformer) == {None}
    assert heads_backends(abstract_module("transformer", TRANSFORMER, jnp.bfloat16)) == {None}


def test_what_is_left_to_xla_keeps_named_kernels(model):
    use_kernels(model)
    block = model.single_blocks[0]
    block.heads_backend = "triton"
    leave_to_xla(model)
    assert block.heads_backend == "triton"
    assert {layer.backend for layer in linears(model, TernaryLinear).values()} == {"jax"}
    assert heads_backends(model) == {"triton", "jax"}


def test_every_linear_may_be_ternary(model):
    """Also those at the ends, which a pipeline asks for its dtype and its devices."""
    everything = random_module("transformer", TRANSFORMER, jnp.bfloat16)
    names = select(list(linears(everything)), Policy(include=("*",)))
    replace_linears(everything, names, lambda _, one: TernaryLinear.from_linear(one, QuantConfig()))
    use_kernels(everything, kernels="jax", attention_by="xla")
    pipe = pipeline_of(everything)
    assert pipe.mesh is None
    embeds = small_pipeline(dtype=jnp.bfloat16).encode_prompt("a red circle")
    out = pipe(embeds, seed=0, num_inference_steps=1, output_type="latent", progress=False)
    assert np.isfinite(out.images).all()
    assert (out.records[0].dtype, out.records[0].platform) == ("bfloat16", "cpu")
    assert pipeline_of(spread_copy(everything, data=2)).mesh is not None
