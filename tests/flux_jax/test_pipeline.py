"""The pipeline's promises, on a random model: seeds, batches, arguments, previews, memory."""

from __future__ import annotations

import dataclasses

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from PIL import Image

from flux_jax import denoise, images
from flux_jax.autoencoder import Autoencoder
from flux_jax.checkpoint import load_checkpoint
from flux_jax.errors import UserError
from flux_jax.functional import ModuleFunction
from flux_jax.latents import pack
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompt_rows import embed_rows, prompt_rows
from flux_jax.prompts import TextEncoders
from flux_jax.residence import modulation_layers
from flux_jax.scheduler import make_schedule
from flux_jax.sharding import make_mesh, shardings
from pallas_kernels.backends import default_device
from tests.random_module import random_module
from tests.small_pipeline import VAE, small_folder, small_pipeline

RED, BLUE = "a red circle", "a blue square above the star"
STEPS = {"num_inference_steps": 3, "progress": False}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


# -- what comes out ------------------------------------------------------------------------------


def test_output_types_agree(pipe):
    def draw(output_type):
        return pipe(RED, seed=1, output_type=output_type, return_latents=True, **STEPS)

    pil, array, latent = draw("pil"), draw("np"), draw("latent")
    assert pil.images[0].size == (32, 32)
    assert array.images.shape == (1, 32, 32, 3)
    assert array.images.dtype == np.float32
    assert 0.0 <= array.images.min() < array.images.max() <= 1.0
    np.testing.assert_array_equal(pixels(pil.images[0]), np.round(array.images[0] * 255))
    assert latent.images.shape == (1, 4, 16)
    np.testing.assert_array_equal(latent.images, array.latents)
    assert pipe(RED, seed=1, **STEPS).latents is None


def test_size_need_not_be_square(pipe):
    image = pipe(RED, seed=0, height=16, width=48, **STEPS).images[0]
    assert image.size == (48, 16)


def test_prompt_seed_and_guidance_matter(pipe):
    def draw(prompt=RED, **options):
        return pipe(prompt, output_type="latent", **{"seed": 0, **STEPS, **options}).images

    reference = draw()
    assert not np.array_equal(draw(BLUE), reference)
    assert not np.array_equal(draw(seed=1), reference)
    assert not np.array_equal(draw(guidance_scale=7.0), reference)
    assert not np.array_equal(draw(num_inference_steps=2), reference)
    np.testing.assert_array_equal(draw(), reference)


def test_schnell_takes_no_guidance():
    schnell = small_pipeline(guidance_embed=False)
    outputs = [schnell(RED, seed=0, guidance_scale=g, progress=False) for g in (0.0, 3.5)]
    np.testing.assert_array_equal(*(pixels(out.images[0]) for out in outputs))
    assert outputs[0].records[0].guidance_scale is None
    assert outputs[0].records[0].num_inference_steps == 4


@pytest.mark.parametrize("steps", [1, denoise.CHUNK, denoise.CHUNK + 1])
def test_the_loop_is_the_euler_method(pipe, steps):
    """Whatever is computed ahead: the same as the whole transformer at every step."""
    out = pipe(RED, seed=5, num_inference_steps=steps, output_type="latent", progress=False)
    embeds = pipe.encode_prompt(RED)
    transformer = ModuleFunction(lambda module, *args: module(*args)).bind(pipe.transformer)
    schedule = make_schedule(pipe.scheduler, steps, 4)
    latents = pack(jax.random.normal(jax.random.key(5, impl="threefry2x32"), (1, 4, 4, 4)))
    for step in range(steps):
        velocity = transformer(
            latents,
            jnp.asarray([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]),
            embeds.prompt_embeds,
            jnp.zeros((12, 3), jnp.int32),
            schedule.timesteps[step : step + 1],
            embeds.pooled_prompt_embeds,
            jnp.full(1, 3.5),
        )
        latents = latents + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * velocity
    np.testing.assert_allclose(out.images, latents, atol=2e-5)


@pytest.fixture
def programs(monkeypatch):
    """Those of the step, without other tests'."""
    made = {}
    monkeypatch.setattr(denoise.VELOCITY, "_programs", made)
    return made


def test_programs_do_not_depend_on_the_number_of_steps(pipe, programs):
    pipe(RED, seed=0, num_inference_steps=3, progress=False)
    assert [program._cache_size() for program in programs.values()] == [1]
    pipe(RED, seed=0, num_inference_steps=11, progress=False)
    assert [program._cache_size() for program in programs.values()] == [1]


def test_large_images_are_decoded_in_tiles(pipe, monkeypatch):
    tokens = pipe(RED, seed=0, height=64, width=96, output_type="latent", **STEPS).images
    whole = images.decode(pipe.vae, jnp.asarray(tokens), (4, 6))
    monkeypatch.setattr(images, "TILE", 6)
    monkeypatch.setattr(images, "OVERLAP", 2)
    forced = images.decode(pipe.vae, jnp.asarray(tokens), (4, 6), tiled=True)
    assert forced.shape == whole.shape == (1, 64, 96, 3)
    assert not np.array_equal(forced, whole)
    # Random weights: tiles agree in the large, as each has statistics of its own.
    assert np.corrcoef(forced.ravel(), whole.ravel())[0, 1] > 0.8
    monkeypatch.setattr(images, "WHOLE_DECODE_PIXELS", 64 * 96 - 1)
    automatic = images.decode(pipe.vae, jnp.asarray(tokens), (4, 6))
    np.testing.assert_array_equal(automatic, forced)
    never = images.decode(pipe.vae, jnp.asarray(tokens), (4, 6), tiled=False)
    np.testing.assert_array_equal(never, whole)


def test_many_images_are_decoded_a_few_at_a_time(pipe, monkeypatch):
    options = {"seed": 0, "batch_size": 3, "output_type": "np", **STEPS}
    together = pipe([RED, BLUE, RED], **options).images
    monkeypatch.setattr(images, "WHOLE_DECODE_PIXELS", 2 * 32 * 32)
    apart = pipe([RED, BLUE, RED], **options).images
    np.testing.assert_allclose(apart, together, atol=1e-5)


def test_a_prompt_of_many_images_is_held_once(pipe):
    plan = pipe.plan(num_images_per_prompt=50)
    rows, negative = prompt_rows(
        [RED, BLUE, RED], BLUE, dataclasses.replace(plan, true_cfg_scale=2)
    )
    assert negative is not None
    prompts, others = embed_rows(
        pipe.text_encoders, [([RED, BLUE, RED], rows), (BLUE, negative)], plan
    )
    assert len(prompts.embeds.prompts) == len(others.embeds.prompts) == 2
    assert [prompts.text(image) for image in (0, 49, 50, 149)] == [RED, RED, BLUE, RED]
    assert others.take([0, 149]).prompts == (BLUE, BLUE)
    given = pipe.encode_prompt([RED, BLUE])
    (held,) = embed_rows(TextEncoders(), [(given, [0] * 50 + [1] * 50)], plan)
    assert held.embeds is given
    assert held.take([49, 50]).prompts == (RED, BLUE)


def test_pictures_are_bytes_before_the_next_ones_are_drawn(pipe, monkeypatch):
    order = []
    to_pil, decode = images.to_pil, images.decode
    monkeypatch.setattr(images, "to_pil", lambda x: order.append(len(x)) or to_pil(x))
    monkeypatch.setattr(images, "decode", lambda *a, **k: order.append("decode") or decode(*a, **k))
    out = pipe([RED, BLUE, RED], seed=0, batch_size=2, **STEPS).images
    assert order == ["decode", 2, "decode", 1]
    expected = pipe([RED, BLUE, RED], seed=0, batch_size=2, output_type="np", **STEPS).images
    for one, other in zip(out, to_pil(expected), strict=True):
        np.testing.assert_array_equal(pixels(one), pixels(other))


def test_as_many_are_decoded_together_as_fit(pipe, monkeypatch):
    tokens = jnp.asarray(pipe([RED, BLUE] * 2, seed=0, output_type="latent", **STEPS).images)
    whole = images.decode(pipe.vae, tokens, (2, 2))
    need = images.decode_bytes(pipe.vae.config, 32 * 32, jnp.float32)
    monkeypatch.setattr(images, "device_memory", lambda _: (9 * need, 2 * need + 1))
    sizes = []
    bind = images.UNPACK_DECODE.bind

    def watched(*args, **options):
        bound = bind(*args, **options)

        def program(leaves, args):
            sizes.append(len(args[0]))
            return bound.program(leaves, args)

        return dataclasses.replace(bound, program=program)

    monkeypatch.setattr(images.UNPACK_DECODE, "bind", watched)
    np.testing.assert_allclose(images.decode(pipe.vae, tokens, (2, 2)), whole, atol=1e-5)
    assert sizes == [2, 2]


def test_the_memory_looked_at_is_that_of_the_autoencoder(pipe, monkeypatch):
    place = jax.local_devices()[3]
    vae = random_module("vae", VAE, jnp.float32, 0)
    nnx.update(vae, jax.device_put(nnx.state(vae), place))
    asked = []
    monkeypatch.setattr(images, "device_memory", lambda device: asked.append(device))
    assert not images.is_tiled_now(vae, 32 * 32, None)
    assert asked == [place]


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_the_default_device_is_taken(tmp_path, placement):
    """Weights, prompts and latents are on the device that JAX was told, not on its first."""
    device = jax.local_devices()[2]
    seen = []
    with jax.default_device(device):
        folder = small_folder(tmp_path / "model")
        pipe = FluxPipeline.from_pretrained(folder, text_encoders=placement)
        seen += [pipe.encode_prompt(RED).prompt_embeds, *jax.tree.leaves(nnx.state(pipe.vae))]
        pipe(RED, callback=lambda step, total, preview: seen.append(preview.latents), **STEPS)
    assert pipe.transformer.device == device
    assert {where for array in seen for where in array.devices()} == {device}


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_a_hub_id_is_resolved_once_at_its_revision(tmp_path, monkeypatch, placement):
    folder, asked = small_folder(tmp_path / "model"), []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"text_encoders": placement, "revision": "0123abc"}
    pipe = FluxPipeline.from_pretrained("owner/name", **options)
    assert pipe.name == "owner/name"
    assert asked == [("owner/name", "0123abc")]
    TextEncoders.from_pretrained("owner/name", placement=placement, revision="v1")
    load_checkpoint("owner/name", components=["vae"], revision="v2")
    assert [revision for _, revision in asked] == ["0123abc", "v1", "v2"]
    assert FluxPipeline.from_pretrained("owner/name", name="ours").name == "ours"


def test_the_default_device_may_be_a_platform():
    with jax.default_device("cpu"):
        assert default_device() == jax.local_devices()[0]
    assert default_device() == jax.local_devices()[0]


# -- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_same_image_alone_in_a_batch_and_again(dtype):
    """Bit for bit, at the default batch size."""
    pipe = small_pipeline(dtype=dtype)
    prompts = [RED, BLUE, "the cube"]
    together = pipe(
        prompts, seed=7, num_images_per_prompt=2, return_latents=True, output_type="np", **STEPS
    )
    assert together.seeds == (7, 8, 9, 10, 11, 12)
    for index in (0, 3, 5):
        prompt, seed = prompts[index // 2], together.seeds[index]
        alone = pipe(prompt, seed=seed, return_latents=True, output_type="np", **STEPS)
        np.testing.assert_array_equal(alone.latents[0], together.latents[index])
        np.testing.assert_array_equal(alone.images[0], together.images[index])
    # Another pipeline of the same weights: run after run.
    again = small_pipeline(dtype=dtype)(prompts[0], seed=7, return_latents=True, **STEPS)
    np.testing.assert_array_equal(again.latents[0], together.latents[0])


def test_larger_batches_agree_to_rounding(pipe):
    prompts = [RED, BLUE, "the cube", RED, BLUE]
    single = pipe(prompts, seed=7, output_type="latent", **STEPS).images
    batched = pipe(prompts, seed=7, output_type="latent", batch_size=2, **STEPS).images
    # float32 sums in another order, through three steps, on values of about 3.
    np.testing.assert_allclose(batched, single, atol=1e-4)
    images = pipe(prompts, seed=7, batch_size=2, **STEPS).images
    assert len(images) == 5


def test_seeds_can_be_listed(pipe):
    listed = pipe([RED, RED], seed=[4, 9], return_latents=True, **STEPS)
    assert listed.seeds == (4, 9)
    alone = pipe(RED, seed=9, return_latents=True, **STEPS)
    np.testing.assert_array_equal(listed.latents[1], alone.latents[0])
    array = pipe([RED, RED], seed=np.array([4, 9]), return_latents=True, **STEPS)
    np.testing.assert_array_equal(array.latents, listed.latents)
    assert array.records == listed.records


def test_without_a_seed_one_is_drawn_and_reported(pipe):
    first, second = (pipe(RED, return_latents=True, **STEPS) for _ in range(2))
    assert first.seeds != second.seeds
    again = pipe(RED, seed=first.seeds[0], return_latents=True, **STEPS)
    np.testing.assert_array_equal(again.latents, first.latents)


def test_keys(pipe):
    key = jax.random.key(3)
    one = pipe([RED, BLUE], key=key, return_latents=True, **STEPS)
    assert one.seeds == (None, None)
    own = jnp.stack([jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)])
    each = pipe([RED, BLUE], key=own, return_latents=True, **STEPS)
    np.testing.assert_array_equal(each.latents, one.latents)


@pytest.mark.parametrize("options", [{"seed": 0}, {"key": jax.random.key(3)}])
def test_no_key_is_used_twice(pipe, options):
    """As JAX checks it where it is asked to; three prompts leave a batch of two to be filled up."""
    with jax.debug_key_reuse(True):
        found = pipe([RED, BLUE, RED], batch_size=2, output_type="latent", **options, **STEPS)
    assert np.isfinite(found.images).all()


@pytest.mark.parametrize("options", [{}, {"placement": "offloaded"}, {"offload_modulation": True}])
def test_nothing_goes_to_the_device_by_accident(options):
    """For who forbids transfers that are not asked for."""
    pipe = small_pipeline(**options)
    with jax.transfer_guard_host_to_device("disallow"):
        found = pipe([RED, BLUE], seed=0, batch_size=2, **STEPS)
    assert len(found.images) == 2


def test_seed_does_not_depend_on_the_default_generator(pipe):
    expected = pipe(RED, seed=2, return_latents=True, **STEPS).latents
    with jax.default_prng_impl("rbg"):
        found = pipe(RED, seed=2, return_latents=True, **STEPS).latents
    np.testing.assert_array_equal(found, expected)


def test_given_latents_are_the_noise_of_the_seed(pipe):
    noise = pack(jax.random.normal(jax.random.key(2, impl="threefry2x32"), (1, 4, 4, 4)))
    given = pipe(RED, latents=noise, return_latents=True, **STEPS)
    seeded = pipe(RED, seed=2, return_latents=True, **STEPS)
    np.testing.assert_array_equal(given.latents, seeded.latents)
    assert given.seeds == (None,)


# -- negative prompts ----------------------------------------------------------------------------


def test_true_cfg_goes_past_the_positive_prompt(pipe):
    """One step is linear in the scale: negative + scale * (positive - negative)."""
    one = {"seed": 0, "num_inference_steps": 1, "output_type": "latent", "progress": False}
    positive, negative = (pipe(text, **one).images for text in (RED, BLUE))
    guided = pipe(RED, negative_prompt=BLUE, true_cfg_scale=3.0, **one).images
    np.testing.assert_allclose(guided, negative + 3.0 * (positive - negative), atol=1e-4)


@pytest.mark.parametrize("options", [{"true_cfg_scale": 4.0}, {"negative_prompt": BLUE}])
def test_true_cfg_needs_both_its_arguments(pipe, options):
    plain = pipe(RED, seed=0, return_latents=True, **STEPS)
    half = pipe(RED, seed=0, return_latents=True, **options, **STEPS)
    np.testing.assert_array_equal(half.latents, plain.latents)
    assert half.records[0].negative_prompt is None


def test_a_negative_prompt_of_another_length_is_refused(pipe, monkeypatch):
    short, whole = (pipe.encode_prompt(BLUE, max_sequence_length=n) for n in (8, 12))
    cfg = {"true_cfg_scale": 2.0, "num_inference_steps": 1, "progress": False, "seed": 0}
    with monkeypatch.context() as checked:
        checked.setattr(TextEncoders, "encode", lambda *_, **__: pytest.fail("encoded"))
        for prompt in (RED, whole):
            with pytest.raises(UserError, match="encoded to 8 tokens and prompt to 12: encode"):
                pipe(prompt, negative_prompt=short, **cfg)
    # Without an effect it is not looked at.
    pipe(RED, negative_prompt=short, **{**cfg, "true_cfg_scale": 1.0})
    pipe(RED, negative_prompt=short, max_sequence_length=8, **cfg)


def test_negative_prompt_of_each(pipe):
    cfg = {"true_cfg_scale": 2.0, "return_latents": True, **STEPS}
    both = pipe([RED, BLUE], negative_prompt=["the cube", "green"], seed=0, **cfg)
    second = pipe(BLUE, negative_prompt="green", seed=1, **cfg)
    np.testing.assert_array_equal(both.latents[1], second.latents[0])
    with pytest.raises(UserError, match="negative_prompt must be one text or 2, .* got 3"):
        pipe([RED, BLUE], negative_prompt=["a"] * 3, **cfg)


# -- callback and progress -----------------------------------------------------------------------


def test_callback_sees_the_predicted_clean_image(pipe):
    seen = []
    out = pipe(
        [RED, BLUE],
        seed=0,
        return_latents=True,
        callback=lambda step, total, preview: seen.append((step, total, preview)),
        **STEPS,
    )
    assert [(step, total, p.indices) for step, total, p in seen] == [
        (step, 3, (index,)) for index in (0, 1) for step in range(3)
    ]
    # The last prediction is the result, for the last step goes to sigma 0.
    last = seen[2][2]
    np.testing.assert_allclose(last.latents, out.latents[:1], atol=1e-5)
    assert np.abs(pixels(last.images()[0]).astype(int) - pixels(out.images[0])).max() <= 1
    # The first is the noise minus the first velocity: what a single step would have drawn.
    single = pipe(RED, seed=0, num_inference_steps=1, return_latents=True, progress=False)
    np.testing.assert_allclose(seen[0][2].latents, single.latents, atol=1e-5)


def test_callback_of_a_batch_sees_no_filling(pipe):
    shapes = []
    pipe(
        [RED] * 3,
        seed=0,
        batch_size=2,
        callback=lambda step, total, preview: shapes.append(preview.latents.shape[0]),
        **STEPS,
    )
    assert shapes == [2] * 3 + [1] * 3


def test_progress_bar_can_be_turned_off(pipe, capfd):
    pipe(RED, seed=0, num_inference_steps=2)
    assert "2/2" in capfd.readouterr().err
    pipe(RED, seed=0, num_inference_steps=2, progress=False)
    assert capfd.readouterr() == ("", "")


# -- text encoders -------------------------------------------------------------------------------


def test_encoded_prompts_outlive_the_encoders():
    pipe = small_pipeline()
    expected = pipe([RED, BLUE], seed=0, num_images_per_prompt=2, return_latents=True, **STEPS)
    embeds = pipe.encode_prompt([RED, BLUE])
    pipe.free_text_encoders()
    found = pipe(embeds, seed=0, num_images_per_prompt=2, return_latents=True, **STEPS)
    np.testing.assert_array_equal(found.latents, expected.latents)
    assert found.records == expected.records
    with pytest.raises(UserError, match="has no text encoders .* encode_prompt"):
        pipe(RED, seed=0, **STEPS)


def test_offloaded_encoders_are_on_the_device_only_while_encoding(pipe):
    def kinds(pipeline):
        modules = pipeline.text_encoders.modules().values()
        return {type(leaf) for module in modules for leaf in jax.tree.leaves(nnx.state(module))}

    offloaded = small_pipeline(placement="offloaded")
    for _ in range(2):
        assert kinds(offloaded) == {np.ndarray}
        out = offloaded(RED, seed=0, return_latents=True, **STEPS)
    expected = pipe(RED, seed=0, return_latents=True, **STEPS)
    np.testing.assert_array_equal(out.latents, expected.latents)
    assert offloaded.fingerprint() == pipe.fingerprint()


def test_modulation_weights_wait_on_the_host(pipe):
    """They are there while the vectors of all steps are computed, and not while the loop runs."""

    def kinds(pipeline):
        layers = modulation_layers(pipeline.transformer)
        return {type(leaf) for layer in layers for leaf in jax.tree.leaves(nnx.state(layer))}

    offloaded = small_pipeline(offload_modulation=True)
    assert (pipe.offload_modulation, offloaded.offload_modulation) == (False, True)
    with pytest.raises(AttributeError):
        # It would move nothing.
        pipe.offload_modulation = True
    during = []
    for _ in range(2):
        out = offloaded(
            RED,
            seed=0,
            callback=lambda *_: during.append(kinds(offloaded)),
            return_latents=True,
            **STEPS,
        )
        assert during == [{np.ndarray}] * len(during)
    expected = pipe(RED, seed=0, return_latents=True, **STEPS)
    np.testing.assert_array_equal(out.latents, expected.latents)
    assert offloaded.fingerprint() == pipe.fingerprint()
    share = sum(
        v.size
        for layer in modulation_layers(pipe.transformer)
        for v in jax.tree.leaves(nnx.state(layer))
    )
    everything = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(offloaded.transformer)))
    assert 0.1 < share / everything < 0.5


def test_a_short_memory_decodes_in_tiles(pipe, monkeypatch):
    tokens = jnp.asarray(pipe(RED, seed=0, output_type="latent", **STEPS).images)
    need = images.decode_bytes(pipe.vae.config, 32 * 32, jnp.float32)
    assert need > images.decode_bytes(pipe.vae.config, 32 * 32, jnp.bfloat16)
    calls = []
    monkeypatch.setattr(
        Autoencoder, "decode_tiled", lambda *a, **k: calls.append(k) or np.zeros((1, 32, 32, 3))
    )
    for free, tiled in ((need - 1, 1), (need, 1), (None, 1)):
        memory = None if free is None else (2 * need, free)
        monkeypatch.setattr(images, "device_memory", lambda _, memory=memory: memory)
        images.decode(pipe.vae, tokens, (2, 2))
        assert len(calls) == tiled
    monkeypatch.setattr(images, "device_memory", lambda _: (2 * need, 0))
    images.decode(pipe.vae, tokens, (2, 2), tiled=False)
    assert len(calls) == 1


def test_a_record_tells_of_tiles_that_the_size_does_not(pipe, monkeypatch):
    def told(**options):
        return [record.tiled for record in pipe([RED, BLUE], seed=0, **options, **STEPS).records]

    monkeypatch.setattr(images, "device_memory", lambda _: (2**30, 0))
    assert told() == [True, True]
    assert told(output_type="latent") == [None, None]
    monkeypatch.setattr(images, "WHOLE_DECODE_PIXELS", 32 * 32 - 1)
    assert told() == [None, None]
    monkeypatch.setattr(pipe, "vae_tiling", False)
    assert told() == [False, False]


def test_sequence_length_is_an_argument(pipe):
    short = pipe(RED, seed=0, max_sequence_length=5, return_latents=True, **STEPS)
    full = pipe(RED, seed=0, return_latents=True, **STEPS)
    assert not np.array_equal(short.latents, full.latents)
    assert short.records[0].max_sequence_length == 5
    assert full.records[0].max_sequence_length == 12


def test_cut_prompt_is_reported(pipe, caplog):
    pipe("red " * 12 + "green star", seed=0, **STEPS)
    t5 = [record.message for record in caplog.records if record.message.startswith("T5")]
    # 14 words, room for 11 and the end token.
    assert len(t5) == 1
    assert "reads 11 tokens and this prompt has 14; not seen: 'red green star'" in t5[0]


# -- weights -------------------------------------------------------------------------------------


def test_a_changed_model_is_used_at_once():
    pipe = small_pipeline()
    before = pipe(RED, seed=0, return_latents=True, **STEPS).latents
    weight = pipe.transformer.final_layer.linear.weight
    weight.set_value(weight.get_value() * 2)
    after = pipe(RED, seed=0, return_latents=True, **STEPS).latents
    assert not np.array_equal(before, after)


def test_widths_must_fit(pipe):
    config = dataclasses.replace(pipe.vae.config, latent_channels=8)
    vae = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="vae gives 32 channels .* in_channels is 16"):
        FluxPipeline(transformer=pipe.transformer, vae=vae, scheduler=pipe.scheduler)


def test_nan_is_reported_not_drawn():
    pipe = small_pipeline()
    weight = pipe.vae.decoder.conv_out.weight
    weight.set_value(weight.get_value() * jnp.nan)
    with pytest.raises(UserError, match="NaN or infinity.*float32"):
        pipe(RED, seed=0, **STEPS)


def test_on_a_mesh(pipe, programs):
    """Weights spread over four devices: the same image to rounding, and one program a stage."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    spread = small_pipeline()
    mesh = make_mesh(fsdp=2, tensor=2)
    models = [spread.transformer, spread.vae, *spread.text_encoders.modules().values()]
    for model in models:
        state = nnx.state(model)
        nnx.update(model, jax.device_put(state, shardings(state, mesh)))
    weight = spread.transformer.double_blocks[0].img_attn.qkv.weight.get_value()
    assert len(weight.sharding.device_set) == 4
    assert weight.addressable_shards[0].data.shape == (24, 32)
    found = spread([RED, BLUE], seed=0, return_latents=True, **STEPS)
    expected = pipe([RED, BLUE], seed=0, return_latents=True, **STEPS)
    np.testing.assert_allclose(found.latents, expected.latents, atol=1e-4)
    assert [program._cache_size() for program in programs.values()] == [1, 1]
    assert spread.fingerprint() == pipe.fingerprint()


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_that_the_caller_has_set_is_not_ours(pipe, kind):
    """`jax.set_mesh` is a whole program's: the model may lie on other devices."""
    previews = []
    options = {"seed": 0, "callback": lambda *given: previews.append(given[-1]), **STEPS}
    expected, fingerprint = pipe(RED, **options), pipe.fingerprint()
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(kind,))):
        found = pipe(pipe.encode_prompt(RED), **options)
        assert pipe.fingerprint() == fingerprint
        pipe.text_encoders.encode(["a star"])
        last = previews[-1].images()[0]
    np.testing.assert_array_equal(pixels(found.images[0]), pixels(expected.images[0]))
    np.testing.assert_array_equal(pixels(last), pixels(expected.images[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "height must be a multiple of 16 pixels, got 40; .* is 32 or 48"),
        ({"width": 7}, "width must be a multiple of 16 pixels, got 7; .* is 16"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 10000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number .* got True"),
        ({"guidance_scale": -1}, "guidance_scale must be a finite number of at least 0, got -1"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale must be a finite number"),
        ({"max_sequence_length": 13}, "max_sequence_length must be at most 12, got 13"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, latent, got 'jpeg'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32 for every image, got 4294967296"),
        ({"seed": [1, 2]}, r"seed must be one integer or a list of 1, one per image, got \[1, 2\]"),
        ({"seed": 1, "key": jax.random.key(0)}, "pass seed or key, not both"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"got shape \(3,\)"),
        ({"latents": np.zeros((1, 4, 15))}, r"shape \(1, 4, 16\) .* got \(1, 4, 15\)"),
        ({"latents": np.full((1, 4, 16), np.inf)}, "latents must be finite"),
        ({"latents": np.zeros((1, 4, 16)), "seed": 1}, "pass latents, or a seed or key"),
    ],
)
def test_refusals(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe(RED, **{"num_inference_steps": 1, "progress": False, **options})


def test_schedule_depends_on_the_size(pipe):
    """The resolution-dependent shift is computed from the image asked for."""
    records = [pipe(RED, seed=0, height=size, **STEPS) for size in (16, 32)]
    assert [r.records[0].height for r in records] == [16, 32]
    shifts = [make_schedule(pipe.scheduler, 3, tokens).sigmas[1] for tokens in (2, 4)]
    assert shifts[0] < shifts[1]


def test_encoded_prompts_must_fit(pipe):
    embeds = pipe.encode_prompt(RED)
    wide = dataclasses.replace(embeds, prompt_embeds=jnp.zeros((1, 12, 40)))
    for name, prompts in (("prompt", (wide, None)), ("negative_prompt", (RED, wide))):
        with pytest.raises(UserError, match=f"^{name} was encoded for another model: .* are 40 "):
            pipe(prompts[0], negative_prompt=prompts[1], seed=0, true_cfg_scale=2.0, **STEPS)
    for field in ("prompt_embeds", "pooled_prompt_embeds"):
        lost = dataclasses.replace(embeds, **{field: getattr(embeds, field) * jnp.nan})
        with pytest.raises(UserError, match="^prompt must have finite embeddings, got NaN"):
            pipe(lost, seed=0, **STEPS)
    for rows in ([], [0, 0]):
        with pytest.raises(UserError, match=f"a row for each prompt, .*got {len(rows)}, 1 and 1"):
            dataclasses.replace(embeds, prompts=(RED,) * len(rows))


def test_encoded_prompts_have_the_length_of_the_call(pipe):
    """A negative prompt is encoded as they were, so that the record's one length holds for both."""
    embeds = pipe.encode_prompt(RED, max_sequence_length=8)
    negative = {"negative_prompt": BLUE, "true_cfg_scale": 2.0, "seed": 0, "return_latents": True}
    found = pipe(embeds, **negative, **STEPS)
    expected = pipe(RED, max_sequence_length=8, **negative, **STEPS)
    np.testing.assert_array_equal(found.latents, expected.latents)
    with pytest.raises(UserError, match="max_sequence_length must be 8, .* got 12"):
        pipe(embeds, max_sequence_length=12, seed=0, **STEPS)


def test_pipeline_without_text_encoders_takes_encoded_prompts(pipe):
    embeds = pipe.encode_prompt(RED)
    bare = FluxPipeline(transformer=pipe.transformer, vae=pipe.vae, scheduler=pipe.scheduler)
    assert isinstance(bare.text_encoders, TextEncoders)
    out = bare(embeds, seed=0, return_latents=True, **STEPS)
    expected = pipe(RED, seed=0, return_latents=True, **STEPS)
    np.testing.assert_array_equal(out.latents, expected.latents)
