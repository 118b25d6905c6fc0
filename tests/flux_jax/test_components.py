"""The four components by their shapes alone: those of the published files, each axis named."""

from __future__ import annotations

import math

import pytest
from flax import nnx

from flux_jax.components import abstract_module
from flux_jax.configs import AutoencoderConfig, CLIPTextConfig, FluxConfig, T5Config
from flux_jax.sharding import DEFAULT_RULES
from flux_jax.tree import to_flat
from tests.small_pipeline import CONFIGS


@pytest.mark.parametrize(
    ("name", "config", "tensors", "parameters"),
    [
        # flux1-dev.safetensors and flux1-schnell.safetensors
        ("transformer", FluxConfig.dev(), 780, 11_901_408_320),
        ("transformer", FluxConfig.schnell(), 776, 11_891_178_560),
        # clip-vit-large-patch14's text tower
        ("text_encoder", CLIPTextConfig.large(), 196, 123_060_480),
        # t5-v1_1-xxl: 9,524,621,312 bytes in bf16, as the files of FLUX.1 hold
        ("text_encoder_2", T5Config.xxl(), 219, 4_762_310_656),
        # ae.safetensors
        ("vae", AutoencoderConfig.flux(), 244, 83_819_683),
    ],
    ids=["dev", "schnell", "clip", "t5", "vae"],
)
def test_the_parameters_are_those_of_the_published_files(name, config, tensors, parameters):
    found = to_flat(abstract_module(name, config))
    assert len(found) == tensors
    assert sum(math.prod(value.shape) for value in found.values()) == parameters


def test_a_module_of_shapes_is_the_caller_s_own():
    """They are built once and copied: what is done to a copy is not done to the next one."""
    config = CONFIGS["transformer"]
    first, second = (abstract_module("transformer", config) for _ in range(2))
    del first.final_layer
    variables = dict(nnx.to_flat_state(nnx.state(first, nnx.Param)))
    for variable in variables.values():
        variable.set_metadata(axes="changed")
    assert variables
    for module in (second, abstract_module("transformer", config)):
        assert hasattr(module, "final_layer")
        found = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
        assert all(found[path].get_metadata()["axes"] != "changed" for path in variables)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_names_its_axes(name):
    flat = nnx.to_flat_state(nnx.state(abstract_module(name, CONFIGS[name]), nnx.Param))
    for path, value in flat:
        axes = value.get_metadata("axes")
        assert len(axes) == len(value.shape), path
        assert {axis for axis in axes if axis is not None} <= DEFAULT_RULES.keys(), path
