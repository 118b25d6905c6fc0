"""Drawing on a mesh: the images of one device, whichever way the devices are laid out."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from flux_jax.attention import attention
from flux_jax.checkpoint import load_checkpoint
from flux_jax.configs import FluxConfig, SchedulerConfig
from flux_jax.denoise import VELOCITY
from flux_jax.errors import UserError
from flux_jax.images import UNPACK_DECODE
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompts import TextEncoders
from flux_jax.sequence import Exchange, is_split, over_all_tokens, tokens_of_a_part
from flux_jax.sharding import make_mesh, spread
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import to_flat
from pallas_kernels.heads import grouped
from ternary.config import QuantConfig
from ternary.policy import Policy
from ternary.student import freeze_student, make_student
from tests.random_module import random_module
from tests.small_pipeline import TRANSFORMER, VAE, small_pipeline

PROMPTS = ["a red circle", "the blue cube", "the star"]
STEPS = {"num_inference_steps": 2, "progress": False, "return_latents": True, "output_type": "np"}
MESHES = [
    {"data": 2},
    {"sequence": 4},
    {"tensor": 2},
    {"data": 2, "sequence": 2},
    {"data": 2, "tensor": 2},
    {"sequence": 2, "tensor": 2},
    {"data": 2, "sequence": 2, "tensor": 2},
]
# Four heads, which four devices can share.
WIDE = dataclasses.replace(TRANSFORMER, hidden_size=64, num_heads=4)


def on_mesh(kind, dtype, mesh):
    pipe = small_pipeline(dtype=dtype)
    transformer = random_module("transformer", WIDE, dtype, 2)
    if kind != "dense":
        quant = QuantConfig(activation_bits=8 if kind == "A8" else 16)
        transformer = freeze_student(make_student(transformer, quant, Policy()))
    return FluxPipeline(
        transformer=transformer,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        text_encoders=pipe.text_encoders,
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def alone():
    """What one device draws, computed once a kind and type."""
    found = {}

    def drawn(kind, dtype):
        if (kind, dtype) not in found:
            found[kind, dtype] = on_mesh(kind, dtype, None)(PROMPTS, seed=0, **STEPS)
        return found[kind, dtype]

    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_images_are_those_of_one_device(alone, axes):
    pipe = on_mesh("dense", jnp.float32, make_mesh(**axes))
    assert pipe.mesh is not None
    found, expected = pipe(PROMPTS, seed=0, **STEPS), alone("dense", jnp.float32)
    assert found.records == expected.records
    np.testing.assert_allclose(found.latents, expected.latents, atol=2e-5)
    np.testing.assert_allclose(found.images, expected.images, atol=2e-5)
    if set(axes) == {"data"}:
        # Each device runs the program that it would run alone.
        np.testing.assert_array_equal(found.images, expected.images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "A16", "A8"])
@pytest.mark.parametrize("axes", [{"data": 2, "sequence": 2}, {"tensor": 2}], ids=str)
def test_images_in_bf16(alone, kind, axes):
    """As close as two roundings of one model are: half a step of bf16 turns an int8 code now and
    then, and no image comes out as another's."""
    found = on_mesh(kind, jnp.bfloat16, make_mesh(**axes))(PROMPTS, seed=0, **STEPS).latents
    expected = alone(kind, jnp.bfloat16).latents
    assert np.abs(found - expected).max() < 0.15
    apart = np.abs(expected[:1] - expected[1:]).mean()
    assert np.abs(found - expected).mean() < 0.05 * apart


def test_another_share_of_text_is_another_program(monkeypatch):
    """Though a single block's shapes are the same: 4 + 16 tokens, and 12 + 8."""
    seen = []
    to_heads = Exchange.to_heads

    def watched(self, sent, meanwhile):
        seen.append((self.text, sent.shape[3]))
        return to_heads(self, sent, meanwhile)

    monkeypatch.setattr(Exchange, "to_heads", watched)
    pipe = small_pipeline(mesh=make_mesh(sequence=2))
    for tokens, height in ((4, 64), (12, 32)):
        pipe(
            "a red circle",
            seed=0,
            height=height,
            width=64,
            max_sequence_length=tokens,
            **{**STEPS, "num_inference_steps": 1},
        )
    # A double block and a single one, each traced for both.
    assert seen == [(2, 10), (2, 10), (6, 10), (6, 10)]


@pytest.mark.slow
def test_ternary_images_over_data_are_the_same_bits(alone):
    for kind in ("A16", "A8"):
        found = on_mesh(kind, jnp.bfloat16, make_mesh(data=4))(PROMPTS, seed=0, **STEPS)
        np.testing.assert_array_equal(found.images, alone(kind, jnp.bfloat16).images)


@pytest.mark.slow
def test_guidance_and_tiles(alone):
    """A negative prompt, an odd number of images in a batch, and a decoder in tiles."""
    options = {**STEPS, "negative_prompt": "the star", "true_cfg_scale": 2.0, "height": 48}
    images = []
    for mesh in (None, make_mesh(data=2, sequence=2)):
        pipe = on_mesh("dense", jnp.float32, mesh)
        pipe.vae_tiling = True
        images.append(pipe(PROMPTS, seed=0, max_sequence_length=10, **options).images)
    np.testing.assert_allclose(*images, atol=2e-5)


class Prepared(NamedTuple):
    """In place of `ProjectedHeads`, what it would compute."""

    q: Any
    k: Any
    v: Any

    def apart(self):
        return tuple(self)

    def grouped(self, groups):
        return grouped(*self, groups)


def test_attention_over_the_sequence_is_exact():
    """Heads are whole, and see their keys in the order of one device."""
    rng = np.random.default_rng(0)
    text, image, devices = 8, 16, 4
    q, k, v = rng.standard_normal((3, 2, text + image, 4, 8), np.float32)
    mesh = make_mesh(sequence=devices)
    spec = PartitionSpec(None, "sequence")

    def part(*parts):
        """Each part is a pair (text, image)."""
        with tokens_of_a_part(text=text // devices):
            assert is_split()
            joined = (jnp.concatenate(pair, axis=1) for pair in parts)
            out, _ = over_all_tokens(attention, Prepared(*joined))
        return out[:, : text // devices], out[:, text // devices :]

    pairs = [(x[:, :text], x[:, text:]) for x in (q, k, v)]
    spread = jax.jit(
        jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    )
    found = np.concatenate(spread(*pairs), axis=1)
    # One head at a time, as each device has it.
    heads = [jax.jit(attention)(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(4)]
    np.testing.assert_array_equal(found, np.concatenate(heads, axis=2))


def test_a_step_exchanges_what_the_documentation_says():
    """Two all-to-alls a block, of q, k, v and of the result; nothing else leaves a device."""
    config = dataclasses.replace(WIDE, depth=2, depth_single_blocks=1)
    pipe = FluxPipeline(
        transformer=random_module("transformer", config, jnp.bfloat16, 0),
        vae=random_module("vae", VAE, jnp.bfloat16, 1),
        scheduler=SchedulerConfig.dev(),
        mesh=make_mesh(sequence=4),
    )
    velocity = VELOCITY.bind(pipe.transformer)
    shape = jax.ShapeDtypeStruct
    args = (
        shape((1, 16, config.in_channels), jnp.float32),
        shape((16, 3), jnp.int32),
        shape((1, 12, config.context_in_dim), jnp.bfloat16),
        shape((12, 3), jnp.int32),
        shape((1, 12 * 2 + 3 + 2, config.hidden_size), jnp.bfloat16),
    )
    lowered = velocity.program.lower(velocity.leaves, args)
    # A single block waits for what is sent and for its MLP's first product, so that the compiler
    # can begin both; a double block has nothing to do meanwhile.
    waits = re.findall(r"optimization_barrier (.*) :", lowered.as_text())
    assert sorted(operands.count("%") for operands in waits) == [1, 2]
    program = lowered.compile().as_text()
    found = [line for line in program.splitlines() if " all-to-all(" in line]
    assert len(found) == 2 * (config.depth + config.depth_single_blocks)
    assert not [name for name in (" all-gather(", " all-reduce(") if name in program]


@pytest.mark.parametrize("axes", [{"sequence": 4}, {"data": 2, "sequence": 2}], ids=str)
def test_the_rows_of_a_picture_are_shared(axes):
    """What a device computes of a decoder, and that the picture is that of one device."""
    vae = random_module("vae", VAE, jnp.float32, 1)
    grid = {"rows": 16, "columns": 8}
    tokens = jax.random.normal(jax.random.key(0), (2, 128, VAE.latent_channels * 4))
    alone = UNPACK_DECODE.bind(vae, **grid)
    expected = alone(tokens)
    spread(vae, make_mesh(**axes))
    shared = UNPACK_DECODE.bind(vae, **grid)
    np.testing.assert_allclose(shared(*shared.place(tokens)), expected, atol=2e-5)
    whole, part = (
        function.lower(*function.place(tokens)).compile().cost_analysis()["flops"]
        for function in (alone, shared)
    )
    # A quarter, and the little that all of them compute.
    assert part < 0.3 * whole


def test_one_device_costs_nothing():
    """On a mesh of one device the program is the one without a mesh."""
    texts = []
    for mesh in (None, make_mesh()):
        config = FluxConfig(**{**dataclasses.asdict(TRANSFORMER), "depth_single_blocks": 0})
        pipe = FluxPipeline(
            transformer=FluxTransformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)),
            vae=random_module("vae", VAE, jnp.float32, 1),
            scheduler=SchedulerConfig.dev(),
            mesh=mesh,
        )
        velocity = VELOCITY.bind(pipe.transformer)
        args = (
            jax.ShapeDtypeStruct((1, 4, 16), jnp.float32),
            jax.ShapeDtypeStruct((4, 3), jnp.int32),
            jax.ShapeDtypeStruct((1, 12, 24), jnp.float32),
            jax.ShapeDtypeStruct((12, 3), jnp.int32),
            jax.ShapeDtypeStruct((1, 14, 32), jnp.float32),
        )
        stats = velocity.program.lower(velocity.leaves, args).compile().cost_analysis()
        texts.append(stats)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        (
            {"data": 4},
            {"batch_size": 6},
            "batch_size must be a multiple of the mesh's data=4, got 6",
        ),
        (
            {"sequence": 4},
            {"height": 48},
            "sequence=4 does not divide the 6 image tokens of 32 x 48",
        ),
        ({"sequence": 8}, {}, "sequence=8 does not divide the 4 attention heads"),
        ({"sequence": 2}, {"max_sequence_length": 11}, "does not divide the 11 text tokens"),
    ],
)
def test_what_a_mesh_cannot_divide_is_refused(axes, options, message):
    pipe = on_mesh("dense", jnp.float32, make_mesh(**axes))
    with pytest.raises(UserError, match=message):
        pipe.plan(**options)


def test_encoded_prompts_that_a_mesh_cannot_divide_are_refused():
    pipe = on_mesh("dense", jnp.float32, make_mesh(sequence=4))
    embeds = pipe.encode_prompt(PROMPTS, max_sequence_length=6)
    for name, prompts in (("prompt", (embeds, None)), ("negative_prompt", (PROMPTS, embeds))):
        with pytest.raises(UserError, match=f"sequence=4 does not divide the 6 .* of {name}:"):
            pipe(prompts[0], negative_prompt=prompts[1], true_cfg_scale=2.0, seed=0, **STEPS)


def test_devices_of_other_processes_are_refused(monkeypatch):
    mesh = make_mesh(data=2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(UserError, match="draws on devices of its own process"):
        on_mesh("dense", jnp.float32, mesh)
    with pytest.raises(UserError, match="draws on devices of its own process"):
        FluxPipeline.from_pretrained("tiny", mesh=mesh)


def test_axes_that_nothing_is_divided_over_are_refused():
    mesh = jax.make_mesh((2, 2), ("batch", "data"))
    for make in (
        lambda: on_mesh("dense", jnp.float32, mesh),
        lambda: FluxPipeline.from_pretrained("tiny", mesh=mesh),
    ):
        with pytest.raises(UserError, match="must be of data, fsdp, sequence, tensor .*got batch$"):
            make()


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_a_mesh_of_jax_s_own_making(placement):
    """Its axes are `Explicit`; ours are not."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
    pipe = small_pipeline(placement=placement, mesh=mesh)
    found, expected = (one(PROMPTS[0], seed=0, **STEPS) for one in (pipe, small_pipeline()))
    np.testing.assert_allclose(found.images, expected.images, atol=1e-4)
    assert pipe.mesh.shape == mesh.shape


def test_text_encoders_that_wait_in_host_memory_go_to_the_mesh():
    pipe = small_pipeline(placement="offloaded", mesh=make_mesh(tensor=2))
    expected = small_pipeline().encode_prompt(PROMPTS)
    assert isinstance(
        pipe.text_encoders.text_encoder_2.token_embedding.weight.get_value(), np.ndarray
    )
    found = pipe.encode_prompt(PROMPTS)
    assert len(found.prompt_embeds.sharding.device_set) == 2
    np.testing.assert_allclose(found.prompt_embeds, expected.prompt_embeds, atol=1e-5)


def test_models_in_place_of_the_checkpoint_s_go_to_the_mesh():
    given = load_checkpoint("tiny", components=["transformer", "text_encoder"]).modules
    encoders = TextEncoders(text_encoder=given["text_encoder"])
    mesh = make_mesh(data=2)
    pipe = FluxPipeline.from_pretrained(
        "tiny", mesh=mesh, transformer=given["transformer"], text_encoders=encoders
    )
    assert pipe.mesh == mesh
    for module in (pipe.transformer, pipe.vae, pipe.text_encoders.text_encoder):
        places = {array.sharding.mesh for array in to_flat(module).values()}
        assert places == {mesh}
