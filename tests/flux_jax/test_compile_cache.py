"""Where compiled programs are kept; each case in its own process, for JAX reads settings once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp
from flux_jax.compile_cache import enable_compilation_cache
print(enable_compilation_cache())
jax.jit(lambda x: jnp.sin(x) + 1)(1.0)
"""


def run(**environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_default_folder_keeps_even_the_smallest_program(tmp_path):
    folder = tmp_path / "flux_jax" / "compiled"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == str(folder)
    assert any(folder.iterdir())


@pytest.mark.parametrize("variable", ["JAX_COMPILATION_CACHE_DIR", "FLUX_JAX_COMPILATION_CACHE"])
def test_folder_from_the_environment(tmp_path, variable):
    chosen = tmp_path / "chosen"
    assert run(XDG_CACHE_HOME=str(tmp_path), **{variable: str(chosen)}) == str(chosen)
    assert any(chosen.iterdir())
    assert not (tmp_path / "flux_jax").exists()


def test_off(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path), FLUX_JAX_COMPILATION_CACHE="off") == "None"
    # Also one that JAX was told of.
    told = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "told"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert run(**told, FLUX_JAX_COMPILATION_CACHE="off") == "None"
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert run(XDG_CACHE_HOME=str(file)) == "None"
