"""The shipped ternary model through the fused products and the kernels, against its reference."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flux_jax import denoise
from flux_jax.assets import STUDENT
from flux_jax.functional import ModuleFunction
from flux_jax.images import psnr
from flux_jax.inputs import dense
from flux_jax.linears import linears
from flux_jax.pipeline import FluxPipeline
from flux_jax.rope import image_ids, text_ids
from pallas_kernels import ternary_matmul
from pallas_kernels.backends import device_of, why_not
from ternary.layers import TernaryLinear

PROMPT = "a red circle above a blue square"
CALL = {"seed": 3, "output_type": "np", "progress": False}
# At least, of the same seed: through the fast path and through the reference; and on a GPU, through
# kernels and through plain JAX.
FUSED_DB, KERNELS_DB = 35.0, 40.0


@pytest.fixture(scope="module")
def pipe():
    return FluxPipeline.from_pretrained(STUDENT)


@pytest.fixture
def unfused(monkeypatch):
    """A switch to ternary linears that compute one thing after the other, rounding each."""

    def call(self, x, *, gate=None, residual=None, branch=None):
        assert branch is None
        bits = {"activation_bits": self.activation_bits, "backend": "jax"}
        bias = self.bias[...]
        y = ternary_matmul(dense(x), self.packed[...], self.scale[...], bias, **bits)
        return y if gate is None else residual + gate[:, None] * y

    def switch():
        monkeypatch.setattr(TernaryLinear, "__call__", call)
        # Programs, and traces of blocks, know layers by their structure, which is the same.
        monkeypatch.setattr(denoise, "VELOCITY", ModuleFunction(denoise._velocity))
        jax.clear_caches()

    yield switch
    jax.clear_caches()


def set_bits(pipe, bits):
    for layer in linears(pipe.transformer, TernaryLinear).values():
        layer.activation_bits = bits


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
def test_fused_products_draw_what_the_reference_draws(pipe, unfused, bits):
    set_bits(pipe, bits)
    fused = pipe(PROMPT, **CALL).images
    unfused()
    reference = pipe(PROMPT, **CALL).images
    assert not np.array_equal(fused, reference)
    assert psnr(fused, reference)[0] >= FUSED_DB


TRANSFORMER = ModuleFunction(lambda transformer, *args: transformer(*args))


def velocity(pipe, rows, tokens=(4, 4), text=6):
    """Of some of two images with different text, time and guidance."""
    config, rng = pipe.transformer.config, np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((2, *shape)), jnp.bfloat16)[rows]

    ids = [jnp.asarray(image_ids(*tokens)), jnp.asarray(text_ids(text))]
    img, txt = draw(tokens[0] * tokens[1], config.in_channels), draw(text, config.context_in_dim)
    vectors = jnp.asarray([0.3, 0.9])[rows], draw(config.vec_in_dim), jnp.asarray([2.0, 6.0])[rows]
    found = TRANSFORMER.bind(pipe.transformer)(img, ids[0], txt, ids[1], *vectors)
    return np.asarray(found, np.float32)


@pytest.mark.parametrize("bits", [8, 16])
def test_images_of_a_batch_have_their_own_modulation(pipe, bits):
    """Each as if alone: gains, shifts and gates are not mixed up."""
    set_bits(pipe, bits)
    together = velocity(pipe, np.array([0, 1]))
    for row in range(2):
        alone = velocity(pipe, np.array([row]))[0]
        error = np.linalg.norm(alone - together[row]) / np.linalg.norm(alone)
        # bfloat16 sums in another order.
        assert error < 0.02, (row, error)
    assert np.linalg.norm(together[0] - together[1]) > 0.5 * np.linalg.norm(together[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize("bits", [8, 16])
def test_kernels_draw_what_the_reference_draws_on_the_cpu(pipe, backend, bits):
    if reason := why_not(backend, device_of(None), jnp.bfloat16, jnp.bfloat16, bits):
        pytest.skip(f"{backend}: {reason}")
    set_bits(pipe, bits)
    pipe.use_kernels(kernels=backend)
    drawn = pipe(PROMPT, **CALL).images
    pipe.use_kernels()
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = FluxPipeline.from_pretrained(STUDENT, kernels="jax", attention="xla")
        set_bits(on_cpu, bits)
        reference = on_cpu(PROMPT, **CALL).images
    assert psnr(drawn, reference)[0] >= KERNELS_DB


@pytest.mark.gpu
def test_the_third_process_draws_what_the_first_did(tmp_path):
    """The first traces, the second finds programs lowered, the third runs none of the code that
    would import the kernels' libraries; each reads what was compiled before."""
    environment = {**os.environ, "FLUX_JAX_COMPILATION_CACHE": str(tmp_path / "cache")}
    images = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        command = [sys.executable, "-m", "flux_jax", "generate", PROMPT, "--out", str(path)]
        done = subprocess.run(
            [*command, "--model", STUDENT, "--seed", "3"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert number == 0 or "persistent compilation cache" not in done.stderr
        images.append(np.asarray(Image.open(path)))
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[0])
