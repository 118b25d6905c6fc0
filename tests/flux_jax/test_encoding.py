"""Text encoders that are not on the device: the same bits, two blocks at a time, nothing left."""

from __future__ import annotations

import contextlib
import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax import encoding, residence
from flux_jax.assets import shipped_path
from flux_jax.checkpoint import load_checkpoint, save_checkpoint, stored_component
from flux_jax.encoding import StreamedT5, t5_states
from flux_jax.errors import UserError
from flux_jax.fingerprint import component_digest
from flux_jax.pipeline import FluxPipeline
from flux_jax.prompts import TextEncoders
from flux_jax.sharding import make_mesh
from flux_jax.tree import to_flat
from tests.random_module import random_module
from tests.small_pipeline import CLIP, T5, small_folder, small_pipeline, tokenizers

PROMPTS = ["a red circle above a blue square", "two green stars", "a cube"]
LAYERS = 5
CONFIG = dataclasses.replace(T5, num_layers=LAYERS)
IDS = [np.arange(24, dtype=np.int32).reshape(2, 12) % 32, np.ones((2, 12), np.int32)]


def random_t5(dtype="bfloat16"):
    return random_module("text_encoder_2", CONFIG, jnp.dtype(dtype))


@contextlib.contextmanager
def counted_arrays():
    """A function that tells the bytes of the arrays made since, without the collector's help."""
    gc.collect()
    gc.disable()
    before = {id(array) for array in jax.live_arrays()}
    try:
        yield lambda: sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)
    finally:
        gc.enable()


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_streamed_states_are_the_resident_ones(dtype):
    encoder = random_t5(dtype)
    expected = t5_states(encoder, IDS)
    found = StreamedT5.from_module(encoder).states(IDS)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_block_by_block_is_the_module_as_a_whole():
    """In float32 to rounding: a program of all blocks is fused otherwise."""
    encoder = random_t5("float32")
    whole = jax.jit(lambda ids: encoder(ids))(IDS[0])
    np.testing.assert_allclose(t5_states(encoder, IDS)[0], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["diffusers", "flax"])
def test_a_checkpoint_is_encoded_alike_wherever_its_weights_are(layout, tmp_path):
    """The shipped model, in both layouts; in one batch or several."""
    path = shipped_path("tiny")
    if layout == "flax":
        names = ["text_encoder", "text_encoder_2"]
        loaded = load_checkpoint(path, components=names)
        save_checkpoint(tmp_path / "m", loaded.modules, tokenizers=loaded.tokenizer_paths)
        path = tmp_path / "m"
    found = {}
    for placement in ("resident", "offloaded", "streamed"):
        encoders = TextEncoders.from_pretrained(path, placement=placement)
        assert isinstance(encoders.text_encoder_2, StreamedT5) == (placement == "streamed")
        found[placement] = encoders.encode(PROMPTS, batch_size=2), encoders.digests()
    for embeds, digests in found.values():
        assert digests == found["resident"][1]
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            expected = getattr(found["resident"][0], name)
            np.testing.assert_array_equal(
                np.asarray(getattr(embeds, name)), np.asarray(expected), name
            )


def test_a_streamed_pipeline_draws_the_same_image():
    resident, streamed = (
        small_pipeline(dtype=jnp.bfloat16, placement=where) for where in ("resident", "streamed")
    )
    options = {"seed": 3, "num_inference_steps": 2, "output_type": "np", "progress": False}
    one, other = (pipe(PROMPTS[0], **options).images for pipe in (resident, streamed))
    np.testing.assert_array_equal(one, other)
    assert resident.fingerprint() == streamed.fingerprint()


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}])
def test_weights_are_read_once_for_states_and_digest(mesh):
    encoder = random_t5("float32")
    host = {path: np.asarray(value) for path, value in to_flat(encoder).items()}
    reads = []

    def read(path):
        reads.append(path)
        return host[path]

    mesh = None if mesh is None else make_mesh(**mesh)
    opened = contextlib.nullcontext(read)
    streamed = StreamedT5(CONFIG, lambda: opened, dtype="float32", mesh=mesh)
    streamed.states(IDS, for_digest=True)
    assert streamed.digest("t5") == component_digest("t5", encoder)
    assert sorted(reads) == sorted(host)
    # Encoding without it keeps what is known.
    streamed.states(IDS[:1])
    assert streamed.digest("t5") == component_digest("t5", encoder)


def test_a_block_is_spread_over_a_mesh():
    encoder = random_t5("float32")
    mesh = make_mesh(fsdp=2, tensor=2)
    host = {path: np.asarray(value) for path, value in to_flat(encoder).items()}
    streamed = StreamedT5(
        CONFIG, lambda: contextlib.nullcontext(host.__getitem__), dtype="float32", mesh=mesh
    )
    (found,) = streamed.states(IDS[:1])
    assert found.sharding.mesh == mesh
    np.testing.assert_allclose(found, t5_states(encoder, IDS[:1])[0], rtol=1e-5, atol=1e-5)


# -- memory --------------------------------------------------------------------------------------


def block_bytes(encoder):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(encoder.blocks[0])))


def test_two_blocks_are_on_the_device_and_each_is_read_once():
    encoder = random_t5("float32")
    block, states = block_bytes(encoder), 2 * IDS[0].size * CONFIG.d_model * 4
    host = {path: np.array(value) for path, value in to_flat(encoder).items()}
    del encoder
    reads, sizes = [], []
    with counted_arrays() as live:

        def read(path):
            reads.append(path)
            sizes.append(live())
            return host[path]

        streamed = StreamedT5(CONFIG, lambda: contextlib.nullcontext(read), dtype="float32")
        results = streamed.states(IDS)
        left = live()
    assert sorted(reads) == sorted(host)
    bias = 12 * 12 * CONFIG.num_heads * 4
    # Hidden states before and after a block; beside the blocks the bias and its table.
    table = host["relative_attention_bias.weight"].nbytes
    assert block < max(sizes) <= 2 * block + 2 * states + bias + table
    assert left == sum(result.nbytes for result in results)


@pytest.mark.parametrize("placement", ["resident", "offloaded", "streamed"])
def test_nothing_is_left_of_freed_encoders(placement):
    with counted_arrays() as live:
        encoders = TextEncoders(
            text_encoder=random_module("text_encoder", CLIP),
            text_encoder_2=random_t5("float32"),
            **tokenizers(),
            placement=placement,
        )
        gc.collect()  # of making random modules
        waiting = live()
        embeds = encoders.encode(PROMPTS)
        kept = embeds.prompt_embeds.nbytes + embeds.pooled_prompt_embeds.nbytes
        if placement == "resident":
            assert waiting > block_bytes(encoders.text_encoder_2) * LAYERS
        else:
            assert waiting == 0
        assert live() == waiting + kept
        encoders.free()
        assert live() == kept


# -- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "placement"),
    [(None, "resident"), ((10**9, 9 * 10**8), "resident"), ((10**6, 5 * 10**5), "streamed")],
)
def test_auto_goes_by_the_memory_left(memory, placement, monkeypatch):
    monkeypatch.setattr(residence, "device_memory", lambda: memory)
    found = TextEncoders.from_pretrained("tiny").placement
    assert found == placement
    mesh = make_mesh()
    assert TextEncoders.from_pretrained("tiny", mesh=mesh).placement == "resident"


def test_room_for_the_work_is_left(monkeypatch):
    monkeypatch.setattr(residence, "device_memory", lambda: (1000, 600))
    assert residence.fits(350)
    assert not residence.fits(351)


def test_bad_placements_are_named():
    expected = "must be one of auto, resident, offloaded, streamed, got 'gpu'"
    with pytest.raises(UserError, match=f"text_encoders {expected}"):
        FluxPipeline.from_pretrained("tiny", text_encoders="gpu")
    with pytest.raises(UserError, match=f"text_encoders {expected}"):
        TextEncoders.from_pretrained("tiny", placement="gpu")
    with pytest.raises(UserError, match="placement must be one of resident, offloaded, streamed"):
        TextEncoders(placement="auto")


def test_what_is_encoded():
    """One text is one prompt, not its letters; one that occurs twice has two rows."""
    encoders = small_pipeline().text_encoders
    one = encoders.encode(PROMPTS[2])
    assert one.prompts == (PROMPTS[2],)
    several = encoders.encode([*PROMPTS, PROMPTS[2]])
    assert several.prompts == (*PROMPTS, PROMPTS[2])
    for row in (2, 3):
        np.testing.assert_array_equal(several.prompt_embeds[row], one.prompt_embeds[0])
    for options, message in (
        ({"prompts": []}, "prompts must be a text or a non-empty list of texts"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number of at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            encoders.encode(**{"prompts": PROMPTS, **options})


def test_a_damaged_file_is_reported_from_the_reading_thread(tmp_path):
    folder = small_folder(tmp_path / "m")
    stored = stored_component(folder, "text_encoder_2", dtype="float32")
    streamed = StreamedT5(stored.config, stored.open, dtype="float32")
    expected = load_checkpoint(folder, components=["text_encoder_2"], dtype="float32")
    module = expected.modules["text_encoder_2"]
    assert stored.nbytes == sum(value.nbytes for value in to_flat(module).values())
    assert streamed.digest("t5") == component_digest("t5", module)
    (file,) = (folder / "text_encoder_2").glob("*.safetensors")
    with stored.open() as read:
        read("final_norm.weight")
        file.write_bytes(b"")
        with pytest.raises(UserError, match="ends early; has the file changed"):
            read("blocks.0.mlp.wo.weight")
    with pytest.raises(UserError, match=str(file)):
        streamed.states(IDS)


def test_all_blocks_share_one_program():
    encoder = random_t5("float32")
    t5_states(encoder, IDS)
    key = {id(encoding.T5_BLOCK.bind(block).program) for block in encoder.blocks}
    assert len(key) == 1
