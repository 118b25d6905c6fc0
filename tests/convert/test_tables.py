"""The tables that ship: total and invertible on every model, every rule of use, no rule unread."""

import dataclasses

import pytest

from convert import tables
from convert.maps import scheduler, transformer
from convert.plan import backward_plan, forward_plan
from flux_jax.configs import (
    AutoencoderConfig,
    CLIPTextConfig,
    FluxConfig,
    SchedulerConfig,
    T5Config,
)
from flux_jax.errors import UserError
from tests.convert.models import check_cover

MODELS = [
    ("transformer", FluxConfig.dev(), 1160, 780),
    ("transformer", FluxConfig.schnell(), 1156, 776),
    ("transformer", FluxConfig.tiny(), 200, 140),
    ("text_encoder", CLIPTextConfig.large(), 196, 196),
    ("text_encoder_2", T5Config.xxl(), 219, 219),
    ("vae", AutoencoderConfig.flux(), 244, 244),
    ("vae", AutoencoderConfig.tiny(), 180, 180),
]
IDS = ["dev", "schnell", "tiny", "clip", "t5", "ae", "tiny-ae"]


@pytest.mark.parametrize(("component", "config", "diffusers", "single"), MODELS, ids=IDS)
def test_tables_are_total_both_ways(component, config, diffusers, single):
    ours = tables.our_shapes(component, config)
    for make, count in ((tables.diffusers_map, diffusers), (tables.single_file_map, single)):
        table = make(component, config)
        back = backward_plan(table, ours)
        stored = {assembly.name: assembly.shape for assembly in back.assemblies}
        assert len(stored) == count
        forward = forward_plan(table, stored, ours, what="test")
        for plan in (back, forward):
            check_cover(plan.assemblies)
        used = {table.target_of(table.strip_prefix(name))[1] for name in stored}
        # Levels of an autoencoder that keep their width or resolution; schnell has no guidance.
        optional = ["conv_shortcut", "samplers"] if component == "vae" else ["guidance"]
        optional = [] if getattr(config, "guidance_embed", False) else optional
        unused = [r.source for r in set(table.rules) - used]
        assert [p for p in unused if not any(word in p for word in optional)] == []


def test_names_are_those_of_the_published_files():
    config = FluxConfig.dev()
    ours = tables.our_shapes("transformer", config)
    theirs = {
        layout: {
            a.name: a.shape for a in backward_plan(make("transformer", config), ours).assemblies
        }
        for layout, make in (("diffusers", tables.diffusers_map), ("bfl", tables.single_file_map))
    }
    # From the headers of black-forest-labs/FLUX.1-dev.
    assert theirs["bfl"]["double_blocks.18.img_mlp.0.weight"] == (12288, 3072)
    assert theirs["bfl"]["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert theirs["bfl"]["final_layer.adaLN_modulation.1.bias"] == (6144,)
    diffusers = theirs["diffusers"]
    assert diffusers["transformer_blocks.18.ff_context.net.0.proj.weight"] == (12288, 3072)
    assert diffusers["single_transformer_blocks.37.proj_mlp.weight"] == (12288, 3072)
    assert diffusers["single_transformer_blocks.0.attn.to_k.bias"] == (3072,)
    assert diffusers["time_text_embed.guidance_embedder.linear_1.weight"] == (3072, 256)
    assert diffusers["norm_out.linear.weight"] == (6144, 3072)


@pytest.mark.parametrize(("component", "config", "diffusers", "single"), MODELS, ids=IDS)
def test_configs_survive_the_way_to_hugging_face_and_back(component, config, diffusers, single):
    del diffusers, single
    assert tables.config_from_hf(component, tables.config_to_hf(component, config)) == config
    ours = tables.config_to_json(config)
    assert tables.config_from_json(component, ours, what="test") == config


def test_every_field_of_a_config_is_checked():
    fields = tables.config_to_json(FluxConfig.dev())
    with pytest.raises(UserError, match="unknown fields depht"):
        tables.config_from_json("transformer", {**fields, "depht": 1}, what="config.json")
    with pytest.raises(UserError, match="config.json: depth must be a positive integer, got 'x'"):
        tables.config_from_json("transformer", {**fields, "depth": "x"}, what="config.json")
    with pytest.raises(UserError, match="config.json: expected an object, got list"):
        tables.config_from_json("transformer", [], what="config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name must be 'FluxTransformer2DModel'"),
        ({"_class_name": "Flux2Transformer2DModel"}, "got 'Flux2Transformer2DModel'"),
        ({"patch_size": 2}, "patch_size must be 1, got 2"),
        ({"in_channels": 384, "out_channels": 64}, "out_channels must be 384, got 64"),
        ({"num_layers": -1}, "depth must be a positive integer, got -1"),
        ({"num_attention_heads": "many"}, "must be positive integers, got 'many'"),
        ({"axes_dims_rope": [16, 56]}, r"sum to the head width 128, got \(16, 56\)"),
        ({"guidance_embeds": "yes"}, "guidance_embed must be true or false"),
    ],
)
def test_a_transformer_that_would_compute_something_else_is_refused(change, message):
    raw = tables.config_to_hf("transformer", FluxConfig.dev()) | change
    with pytest.raises(UserError, match=message):
        tables.config_from_hf("transformer", raw)


def test_diffusers_defaults_are_known():
    assert tables.config_from_hf("transformer", {"guidance_embeds": True}) == FluxConfig.dev()
    assert tables.config_from_hf("transformer", {}) == FluxConfig.schnell()


def test_a_transformer_that_diffusers_lacks_is_not_exported():
    config = dataclasses.replace(FluxConfig.tiny(), mlp_ratio=3.0)
    with pytest.raises(UserError, match="has mlp_ratio 4 .* this one has 3.0 .* --to bfl"):
        tables.config_to_hf("transformer", config)


def test_schedules_survive_and_foreign_ones_are_refused():
    for config in (SchedulerConfig.dev(), SchedulerConfig.schnell()):
        assert scheduler.config_from_hf(scheduler.config_to_hf(config)) == config
    raw = scheduler.config_to_hf(SchedulerConfig.dev())
    for change in ({"_class_name": "DDIMScheduler"}, {"use_karras_sigmas": True}):
        with pytest.raises(UserError, match=f"{next(iter(change))} must be"):
            scheduler.config_from_hf(raw | change)


@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell()])
def test_a_single_file_tells_its_config(config):
    ours = tables.our_shapes("transformer", config)
    plan = backward_plan(transformer.bfl_map(config), ours)
    shapes = {assembly.name: assembly.shape for assembly in plan.assemblies}
    assert tables.config_from_shapes("transformer", shapes, what="file") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.weight": (3072, 384)}, "takes 384 channels and gives 64: a Fill, Canny or Depth"),
        ({"txt_in.weight": None}, "not a FLUX.1 transformer: tensor `txt_in.weight` is missing"),
        ({"txt_in.weight": (3,)}, r"tensor `txt_in.weight` has shape \[3\]"),
        (
            {"double_blocks.0.img_attn.norm.query_norm.scale": (64,)},
            "heads of width 64 at hidden size 3072: the rotary widths cannot be told",
        ),
    ],
)
def test_a_single_file_of_another_kind_is_named(change, message):
    config = FluxConfig.dev()
    plan = backward_plan(transformer.bfl_map(config), tables.our_shapes("transformer", config))
    shapes = {a.name: a.shape for a in plan.assemblies} | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(UserError, match=f"^file: .*{message}"):
        tables.config_from_shapes("transformer", shapes, what="file")
