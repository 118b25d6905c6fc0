"""The embeddings on disk: whole files, whatever happened to an earlier process."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from flux_jax.prompt_embeds import PromptEmbeds
from ternary.distillation.text_cache import cached_embeds
from tests.jobs import with_devices

SHAPE = (3, 4, 2)


def encode(texts):
    return PromptEmbeds(
        prompts=tuple(texts),
        prompt_embeds=jnp.ones((len(texts), 3, 4), jnp.bfloat16),
        pooled_prompt_embeds=jnp.ones((len(texts), 2), jnp.bfloat16),
    )


def test_what_a_killed_process_left_is_written_over(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        "from ternary.distillation.text_cache import cached_embeds\n"
        "encode = lambda texts: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached_embeds(pathlib.Path(sys.argv[1]), ['a', 'b'], encode, key='k', shape=(3, 4, 2))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=with_devices(1))
    assert killed.returncode == -9
    (cache,) = tmp_path.iterdir()
    assert len(list(cache.iterdir())) == 1
    table = cached_embeds(tmp_path, ["a", "b"], encode, key="k", shape=SHAPE)
    np.testing.assert_array_equal(table.take(np.array([1]))[0], np.ones((1, 3, 4)))
    table.close()
    assert [path.name for path in cache.iterdir()] == ["000000.safetensors"]
