"""Name maps of the text encoders and the autoencoder: names as in FLUX.1's own files."""

from __future__ import annotations

import pytest

from convert import tables
from convert.maps import autoencoder, clip, t5
from convert.plan import backward_plan, forward_plan
from flux_jax.configs import AutoencoderConfig, CLIPTextConfig, T5Config
from flux_jax.errors import UserError
from tests.convert.models import check_cover

CONFIGS = {
    "text_encoder": CLIPTextConfig.large(),
    "text_encoder_2": T5Config.xxl(),
    "vae": AutoencoderConfig.flux(),
}
# Of each file of FLUX.1: the number of tensors, and some by name and shape.
MAPS = {
    "clip": (
        "text_encoder",
        clip.diffusers_map,
        196,
        {
            "text_model.embeddings.position_embedding.weight": (77, 768),
            "text_model.encoder.layers.11.self_attn.out_proj.bias": (768,),
            "text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
            "text_model.final_layer_norm.weight": (768,),
        },
    ),
    "t5": (
        "text_encoder_2",
        t5.diffusers_map,
        219,
        {
            "shared.weight": (32128, 4096),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
            "encoder.block.23.layer.1.DenseReluDense.wo.weight": (4096, 10240),
            "encoder.final_layer_norm.weight": (4096,),
        },
    ),
    "diffusers": (
        "vae",
        autoencoder.diffusers_map,
        244,
        {
            "decoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
            "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
            "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
            "encoder.down_blocks.2.downsamplers.0.conv.bias": (512,),
            "encoder.conv_norm_out.weight": (512,),
        },
    ),
    "bfl": (
        "vae",
        autoencoder.bfl_map,
        244,
        {
            "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
            "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "encoder.down.2.downsample.conv.bias": (512,),
            "encoder.norm_out.weight": (512,),
        },
    ),
}


def exported(name: str) -> tuple:
    component, make, count, known = MAPS[name]
    table, ours = make(CONFIGS[component]), tables.our_shapes(component, CONFIGS[component])
    plan = backward_plan(table, ours)
    return table, ours, plan, count, known


@pytest.mark.parametrize("name", MAPS)
def test_the_names_and_shapes_are_those_of_the_files(name):
    _, _, plan, count, known = exported(name)
    check_cover(plan.assemblies)
    found = {a.name: a.shape for a in plan.assemblies}
    assert len(found) == count
    assert {name: found.get(name) for name in known} == known


@pytest.mark.parametrize("name", MAPS)
def test_what_is_exported_is_read_again(name):
    table, ours, plan, _, _ = exported(name)
    sources = {a.name: a.shape for a in plan.assemblies}
    back = forward_plan(table, sources, ours, what="test")
    check_cover(back.assemblies)
    assert {a.name: a.shape for a in back.assemblies} == ours
    assert back.dropped == ()


@pytest.mark.parametrize("name", MAPS)
def test_a_leftover_is_named(name):
    table, ours, plan, _, _ = exported(name)
    sources = {a.name: a.shape for a in plan.assemblies} | {"encoder.extra.weight": (3,)}
    with pytest.raises(UserError, match="`encoder.extra.weight` of shape .* is not expected"):
        forward_plan(table, sources, ours, what="test")


def test_either_name_of_the_t5_embedding_will_do():
    table, ours, plan, _, _ = exported("t5")
    sources = {a.name: a.shape for a in plan.assemblies}
    tied = {**sources, "encoder.embed_tokens.weight": sources["shared.weight"]}
    both = forward_plan(table, tied, ours, what="test")
    assert both.ties == (("encoder.embed_tokens.weight", "shared.weight"),)
    del tied["shared.weight"]
    one = forward_plan(table, tied, ours, what="test")
    (embedding,) = [a for a in one.assemblies if a.name == "token_embedding.weight"]
    assert [piece.source for piece in embedding.pieces] == ["encoder.embed_tokens.weight"]


def test_positions_stored_in_old_clip_files_are_dropped():
    table, ours, plan, _, _ = exported("clip")
    sources = {a.name: a.shape for a in plan.assemblies}
    sources["text_model.embeddings.position_ids"] = (1, 77)
    ((name, reason),) = forward_plan(table, sources, ours, what="test").dropped
    assert name == "text_model.embeddings.position_ids"
    assert "computed" in reason


def test_clip_names_without_the_old_prefix_will_do():
    table, ours, plan, _, _ = exported("clip")
    sources = {a.name.removeprefix("text_model."): a.shape for a in plan.assemblies}
    assert len(forward_plan(table, sources, ours, what="test").assemblies) == 196
