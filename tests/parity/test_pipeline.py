"""The whole pipeline against diffusers' `FluxPipeline`: one folder, one prompt, one noise."""

from __future__ import annotations

import gc
import json
import weakref

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from convert import hub
from convert.maps import autoencoder, clip, t5
from convert.tables import COMPONENTS
from flux_jax import compare as our_compare
from flux_jax.cli import app
from flux_jax.compare import Finding, compare, psnr
from flux_jax.functional import ModuleFunction
from flux_jax.latents import pack, unpack
from flux_jax.pipeline import FluxPipeline
from flux_jax.reference import Reference
from tests.parity.common import perturb_vectors, relative_error
from tests.small_pipeline import CLIP, T5, T5_LENGTH, TRANSFORMER, VAE, tokenizers

PROMPT = "a red circle above blue star"
# What the project promises for the shipped model; a random one must do no worse.
LEAST_PSNR = 45.0


def scheduler(guided: bool) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """dev's or schnell's."""
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {"shift": 1.0}
    return diffusers.FlowMatchEulerDiscreteScheduler(**shift)


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def folder(request, tmp_path_factory):
    """A random model as diffusers saves it."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=TRANSFORMER.in_channels,
        num_layers=TRANSFORMER.depth,
        num_single_layers=TRANSFORMER.depth_single_blocks,
        attention_head_dim=TRANSFORMER.head_dim,
        num_attention_heads=TRANSFORMER.num_heads,
        joint_attention_dim=TRANSFORMER.context_in_dim,
        pooled_projection_dim=TRANSFORMER.vec_in_dim,
        guidance_embeds=request.param,
        axes_dims_rope=TRANSFORMER.axes_dim,
    )
    parts = {
        "transformer": transformer,
        "vae": diffusers.AutoencoderKL(**autoencoder.config_to_hf(VAE)),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**clip.config_to_hf(CLIP))
        ),
        "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(**t5.config_to_hf(T5))),
    }
    for seed, model in enumerate(parts.values()):
        perturb_vectors(model.eval(), seed)
    path = tmp_path_factory.mktemp("model")
    diffusers.FluxPipeline(
        scheduler=scheduler(request.param), **parts, **tokenizers()
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipes(folder):
    """diffusers' pipeline and ours from the same folder."""
    theirs = diffusers.FluxPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs, FluxPipeline.from_pretrained(folder, dtype=jnp.float32)


def noise(count: int, height: int = 4, width: int = 6) -> np.ndarray:
    """Packed noise for images of 8 * height x 8 * width pixels."""
    grid = np.random.default_rng(1).standard_normal((count, height, width, 4), np.float32)
    return np.array(pack(jnp.asarray(grid)))


def draw_both(pipes, prompts, **options):
    theirs, ours = pipes
    start = noise(len(prompts))
    shared = {"height": 32, "width": 48, "num_inference_steps": 5, **options}
    found = ours(prompts, latents=start, return_latents=True, progress=False, **shared)
    length = {"max_sequence_length": T5_LENGTH, **shared}
    latents, images = (
        theirs(prompts, latents=torch.from_numpy(start), output_type=kind, **length).images
        for kind in ("latent", "pil")
    )
    return found, latents.numpy(), images


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 3.5},
        {"guidance_scale": 1.0, "negative_prompt": "a green cube", "true_cfg_scale": 4.0},
        {"max_sequence_length": 6},
    ],
    ids=["plain", "negative", "short"],
)
def test_same_image(pipes, options):
    found, latents, images = draw_both(pipes, [PROMPT], **options)
    # Each of the steps adds the rounding of one transformer pass (1e-5 at most).
    assert relative_error(found.latents, latents) < 5e-5
    assert psnr(found.images[0], images[0]) > LEAST_PSNR
    assert np.asarray(images[0]).std() > 10, "a flat image would prove nothing"


def test_several_prompts(pipes):
    found, latents, images = draw_both(pipes, [PROMPT, "the cube"])
    assert relative_error(found.latents, latents) < 5e-5
    for ours, theirs in zip(found.images, images, strict=True):
        assert psnr(ours, theirs) > LEAST_PSNR


def test_packing_is_theirs():
    grid = np.random.default_rng(0).standard_normal((2, 6, 4, 3)).astype(np.float32)
    nchw = torch.from_numpy(grid.transpose(0, 3, 1, 2).copy())
    theirs = diffusers.FluxPipeline._pack_latents(nchw, 2, 3, 6, 4)
    np.testing.assert_array_equal(pack(jnp.asarray(grid)), theirs.numpy())
    np.testing.assert_array_equal(unpack(jnp.asarray(theirs.numpy()), 6, 4), grid)


def test_rounding_to_bytes_is_theirs(pipes):
    """Including what lies exactly between two bytes."""
    from diffusers.image_processor import VaeImageProcessor

    from flux_jax.images import to_pil, to_unit_range

    values = np.linspace(-1.2, 1.2, 4 * 511, dtype=np.float32).reshape(1, 1, -1, 1)
    decoded = np.repeat(np.repeat(values, 2, axis=1), 3, axis=3)
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded.transpose(0, 3, 1, 2)))
    ours = to_pil(to_unit_range(decoded))
    np.testing.assert_array_equal(np.asarray(ours[0]), np.asarray(theirs[0]))


@pytest.mark.long
def test_compare_finds_no_difference(folder):
    findings = list(compare(folder, num_inference_steps=2))
    assert [finding.name for finding in findings if not finding.passed] == []
    names = {finding.name.split()[0].rstrip(",") for finding in findings}
    assert names >= {"text_encoder", "text_encoder_2", "scheduler", "transformer", "vae", "image"}


def test_a_model_of_the_reference_is_gone_when_its_function_has_returned(folder, monkeypatch):
    """Though it is in cycles: ours is loaded next, and both would need room."""
    made = []
    load = Reference._model

    def watched(self, model_class, component):
        model = load(self, model_class, component)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Reference, "_model", watched)
    reference = Reference(folder, "float32")
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, 5, TRANSFORMER.context_in_dim), np.float32)
    pooled = rng.standard_normal((1, TRANSFORMER.vec_in_dim), np.float32)
    tokens = rng.standard_normal((1, 4, TRANSFORMER.in_channels), np.float32)
    run = {"times": (0.5,), "guidance": 4.0, "steps": 1, "side": 4}
    gc.disable()
    try:
        reference.transformer(tokens, (2, 2), text, pooled, **run)
        reference.clip(np.zeros((1, 4), np.int32))
        reference.vae(np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 2, 2, 4), np.float32))
        assert [kept() is None for kept in made] == [True] * 3
    finally:
        gc.enable()


@pytest.mark.long
def test_compare_finds_a_difference(folder, monkeypatch):
    """A fault in one component is found there, and the command exits with 1."""

    def faulty(vae, latents):
        return vae.decode(latents) * 1.001

    monkeypatch.setattr(our_compare, "DECODE", ModuleFunction(faulty))
    result = CliRunner().invoke(app, ["compare", str(folder), "--steps", "1"])
    failed = [line for line in result.stdout.splitlines() if "FAILED" in line]
    assert [line.split("  ")[0] for line in failed] == ["vae, decode"]
    assert result.exit_code == 1


def test_compare_report_is_json():
    findings = [Finding("image", float("inf"), 45.0, "dB"), Finding("vae", 2e-3, 1e-5)]
    report = json.loads(
        json.dumps(our_compare.report("tiny", "float32", findings), allow_nan=False)
    )
    assert [(f["value"], f["passed"]) for f in report["findings"]] == [(None, True), (2e-3, False)]
    assert report["passed"] is False


@pytest.mark.parametrize("arguments", [[], ["--seed", "-1"], ["--steps", "0"]])
def test_compare_refuses_in_one_line(folder, tmp_path, arguments):
    """A folder that is no pipeline, or arguments that `generate` would not take either."""
    assert_refused(folder if arguments else tmp_path, *arguments)


def test_compare_refuses_what_diffusers_cannot_load():
    assert "diffusers cannot load a quantised transformer" in assert_refused("tiny-ternary")


def assert_refused(model, *arguments):
    result = CliRunner().invoke(app, ["compare", str(model), *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_compare_has_all_of_a_repository_before_it_begins(folder, tmp_path, monkeypatch):
    """PyTorch reads the files of a component, whichever of the two comes first."""
    small = ("scheduler", "tokenizer", "tokenizer_2", "model_index.json")

    def download(repo, components=None, *, revision=None):
        for name in (*small, *(COMPONENTS if components is None else components)):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(folder / name)
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    next(compare("someone/FLUX", num_inference_steps=1))
    assert {path.name for path in tmp_path.iterdir()} == {*small, *COMPONENTS}
