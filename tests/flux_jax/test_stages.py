"""Programs compiled before the weights are there are those that a call runs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from flux_jax import compile_cache, denoise, encoding, images, prompts
from flux_jax.loading import check_request, lower_ahead
from flux_jax.pipeline import FluxPipeline
from tests.small_pipeline import small_folder

CALL = {"height": 48, "width": 32, "num_inference_steps": 2, "max_sequence_length": 9}
FUNCTIONS = (
    prompts.CLIP,
    encoding.T5_BLOCK,
    denoise.MODULATIONS,
    denoise.VELOCITY,
    images.UNPACK_DECODE,
)


@pytest.fixture
def compiled():
    """Names of the functions that are compiled from here on."""
    found = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            found.append(re.sub(r"jit\((.*)\)|jit_(.*)", r"\1\2", fun_name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("placement", "stored"), [("resident", False), ("streamed", False), ("streamed", True)]
)
def test_a_call_compiles_nothing_that_was_compiled_ahead(
    placement, stored, tmp_path, monkeypatch, compiled
):
    if stored:
        monkeypatch.setattr(compile_cache, "_enabled", [tmp_path])
    for function in FUNCTIONS:
        # Those of other tests would be found, too.
        monkeypatch.setattr(function, "_programs", {})
    folder = small_folder(tmp_path / "m")
    request = check_request(folder, CALL, images=1, num_images_per_prompt=1)
    for program in lower_ahead(request, "float32"):
        program.compile()
    ahead = set(compiled)
    expected = {"_clip", "_block", "_modulations", "_velocity", "_unpack_decode"}
    assert expected <= ahead
    compiled.clear()
    pipe = FluxPipeline.from_pretrained(folder, dtype=jnp.float32, text_encoders=placement)
    pipe("a red circle", seed=0, progress=False, **CALL)
    assert not expected & set(compiled)
    # Another size is another program.
    pipe("a red circle", seed=0, progress=False, **{**CALL, "height": 32})
    assert {"_velocity", "_unpack_decode"} <= set(compiled)
