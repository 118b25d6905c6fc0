"""What a source is told when it is not FLUX.1, or not whole."""

import json
import shutil

import numpy as np
import pytest

from convert.source import open_source, parameters
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from tests.convert.models import (
    diffusers_folder,
    random_parameters,
    stored_tensors,
    write_tensors,
)

TEXT = ("text_encoder", "text_encoder_2")


@pytest.fixture
def folder(tmp_path):
    """A small diffusers folder: text encoders only."""
    diffusers_folder(tmp_path / "m", TEXT)
    return tmp_path / "m"


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def opened(path, components=None):
    with open_source(path, components) as source:
        for name, component in source.components.items():
            parameters(name, component, None)
        return source


def test_a_folder_is_opened(folder):
    source = opened(folder)
    assert source.kind == "diffusers"
    assert tuple(source.components) == TEXT
    assert source.scheduler is not None
    assert source.scheduler.max_shift == 1.25
    assert set(source.tokenizers) == {"tokenizer", "tokenizer_2"}
    assert opened(folder, []).components == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusion3Pipeline", "this is Stable Diffusion 3 ('StableDiffusion3Pipeline')"),
        ("StableDiffusionXLPipeline", "this is Stable Diffusion XL"),
        ("Flux2Pipeline", "this is FLUX.2 ('Flux2Pipeline'), expected FLUX.1"),
        ("FluxFillPipeline", "this is FLUX.1-Fill, which fills in a given image ("),
        ("FluxKontextPipeline", "this is FLUX.1-Kontext, which edits a given image ("),
        ("FluxKontextInpaintPipeline", "this is FLUX.1-Kontext, which edits a given image ("),
        ("FluxPriorReduxPipeline", "this is FLUX.1-Redux, which varies a given image ("),
        ("FluxControlPipeline", "this is FLUX.1-Canny or -Depth, which follows a given image ("),
        ("FluxControlNetPipeline", "this is FLUX.1 with a ControlNet ("),
        (None, "this is another model ('None')"),
    ],
)
def test_another_pipeline_is_named(folder, name, message):
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert message in str(caught.value)


def test_another_architecture_of_a_component_is_named(folder):
    edit(folder / "text_encoder" / "config.json", model_type="siglip_text_model")
    with pytest.raises(UserError, match="text_encoder/config.json: .*'siglip_text_model'"):
        opened(folder)


def test_a_component_that_was_not_downloaded_is_named(folder):
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match="text_encoder_2: missing, though model_index.json lists"):
        opened(folder)
    assert tuple(opened(folder, ["text_encoder"]).components) == ("text_encoder",)


def test_a_component_that_is_not_there_is_named(folder):
    with pytest.raises(UserError, match="has no vae; it has text_encoder"):
        opened(folder, ["text_encoder", "vae"])
    # Though none of them was asked for.
    with pytest.raises(UserError, match="has no vae; it has text_encoder, text_encoder_2$"):
        opened(folder, ["vae"])
    with pytest.raises(UserError, match="text_encoder: has no vae; it has text_encoder$"):
        opened(folder / "text_encoder", ["vae"])


def test_a_pipeline_without_weights_is_named(folder):
    edit(folder / "model_index.json", text_encoder=[None, None], text_encoder_2=[None, None])
    with pytest.raises(UserError, match="lists no component with weights"):
        opened(folder)


def test_names_and_shapes_are_checked_before_anything_is_read(folder):
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"text_encoder of .*: 16 problems: .*does not have"):
        opened(folder)
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=2, vocab_size=33)
    with pytest.raises(UserError, match=r"token_embedding.weight` has shape \[32, 64\], exp.*33"):
        opened(folder)


def test_a_config_that_makes_no_model_is_named_with_its_file(folder):
    edit(folder / "text_encoder" / "config.json", num_attention_heads=7)
    with pytest.raises(UserError, match=r"text_encoder of .*: hidden_size must be a multiple of"):
        opened(folder)


def test_a_path_that_is_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        opened(tmp_path / "x")
    with pytest.raises(UserError, match="neither model_index.json nor config.json nor"):
        opened(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="model.gguf: not a .safetensors file"):
        opened(tmp_path / "model.gguf")


def test_a_component_folder_of_another_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(UserError, match="config.json is of 'SD3Transformer2DModel', expected one"):
        opened(tmp_path)
    for content in ("{}", '{"architectures": 5}', '{"architectures": [5]}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="config.json is of 'no class name'"):
            opened(tmp_path)


def test_a_component_folder_gives_what_is_asked_for(folder):
    path = folder / "text_encoder"
    assert tuple(opened(path).components) == ("text_encoder",)
    assert opened(path, []).components == {}
    with pytest.raises(UserError, match="has no vae; it has text_encoder"):
        opened(path, ["vae"])


def test_a_schedule_that_cannot_be_read_is_named_with_its_file(folder):
    edit(folder / "scheduler" / "scheduler_config.json", shift="x")
    with pytest.raises(
        UserError, match="scheduler_config.json: .*shift must be a finite number, got 'x'"
    ):
        opened(folder)


@pytest.mark.parametrize("name", ["flux.ckpt", "flux.pt", "flux.bin", "flux.pkl"])
def test_a_pickle_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=f"{name}: refused: a pickle can run any code"):
            opened(path)


FOREIGN = {
    "double_stream_modulation_img.lin.weight": "this is a FLUX.2 transformer; expected FLUX.1",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 tran",
    "model.diffusion_model.input_blocks.0.0.weight": "a Stable Diffusion 1, 2 or XL model",
    "down_blocks.0.resnets.0.conv1.weight": "a Stable Diffusion 1, 2 or XL model",
    "double_blocks.0.img_attn.qkv.lora_A.weight": "a LoRA, not a whole model",
    "lora_unet_double_blocks_0.alpha": "a LoRA, not a whole model",
    "transformer_blocks.0.attn.to_q.weight": "one component in diffusers' layout: pass the folder",
    "double_blocks.0.img_attn.qkv.weight.absmax": "quantised below 8 bits",
    "something.else": "no FLUX.1 model recognised (its first tensor is `something.else`)",
    "vae.double_blocks.0.img_attn.qkv.weight": "the vae in it is a transformer",
}


@pytest.mark.parametrize(("name", "message"), FOREIGN.items())
def test_another_architecture_in_a_single_file_is_named(tmp_path, name, message):
    path = write_tensors(tmp_path / "x.safetensors", {name: np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_without_tensors_is_named(tmp_path):
    path = write_tensors(tmp_path / "x.safetensors", {})
    with pytest.raises(UserError, match="it holds no tensors"):
        opened(path)


def autoencoder_file(path, metadata=None, **changes):
    tensors = stored_tensors("vae", random_parameters("vae"), "bfl") | changes
    kept = {n: a for n, a in tensors.items() if a is not None}
    return write_tensors(path, kept, metadata)


def test_an_autoencoder_of_stable_diffusion_is_named(tmp_path):
    zeros = {"quant_conv.weight": np.zeros((2, 2), np.float32)}
    path = autoencoder_file(tmp_path / "ae.safetensors", **zeros)
    with pytest.raises(UserError, match="this is an autoencoder of Stable Diffusion"):
        opened(path)


def test_tensors_that_a_guess_needs_are_named(tmp_path):
    gone = {"encoder.conv_in.weight": None}
    with pytest.raises(UserError, match="ae.safetensors: tensor `encoder.conv_in.weight` is miss"):
        opened(autoencoder_file(tmp_path / "ae.safetensors", **gone))
    flat = {"encoder.conv_in.weight": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match="the shapes are not those of a vae"):
        opened(autoencoder_file(tmp_path / "ae2.safetensors", **flat))


def test_strangers_beside_prefixed_components_are_named(tmp_path):
    vae = stored_tensors("vae", random_parameters("vae"), "bfl")
    tensors = {f"vae.{n}": a for n, a in vae.items()} | {"stray": np.zeros(1, np.float32)}
    path = write_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match="tensor `stray` belongs to no component"):
        opened(path)


def test_the_same_component_twice_is_named(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        autoencoder_file(tmp_path / name)
    with pytest.raises(UserError, match="vae of .*b.safetensors: there is another in vae of .*a.s"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "in its metadata: not valid JSON"),
        ('{"vae": {"depth": 1}}', "vae: unknown fields depth"),
    ],
)
def test_a_config_in_a_file_is_checked(tmp_path, text, message):
    path = autoencoder_file(tmp_path / "ae.safetensors", {"flux_jax.config": text})
    with pytest.raises(UserError, match=message):
        opened(path)


def test_the_schedule_of_a_single_file_follows_its_guidance(tmp_path):
    tensors = stored_tensors("transformer", random_parameters("transformer"), "bfl")
    write_tensors(tmp_path / "dev.safetensors", tensors)
    schnell = {n: a for n, a in tensors.items() if not n.startswith("guidance_in")}
    write_tensors(tmp_path / "schnell.safetensors", schnell)
    assert opened(tmp_path / "dev.safetensors").scheduler == SchedulerConfig.dev()
    assert opened(tmp_path / "schnell.safetensors").scheduler == SchedulerConfig.schnell()
    assert opened(autoencoder_file(tmp_path / "ae.safetensors")).scheduler is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this program reads 1"),
        ({"components": None}, "has no `components`"),
        ({"components": {"unet": {}}}, "unknown component unet"),
        ({"components": {"vae": {"depth": 1}}}, "config.json: vae: unknown fields depth"),
        ({"components": {"vae": {}}}, "config.json: vae: in_channels is missing"),
        ({"scheduler": {"shift": "x"}}, "config.json: .*shift must be a finite number, got 'x'"),
        ({"scheduler": "dev"}, "config.json: scheduler must be an object or null, got str"),
    ],
)
def test_a_flax_checkpoint_that_is_not_ours_to_read_is_named(tmp_path, changes, message):
    content = {"format": "flux_jax", "format_version": 1, "components": {}, "scheduler": None}
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=message):
        opened(tmp_path)
