"""Where compiled programs are kept; each case in its own process, for JAX reads settings once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import jax, jax.numpy as jnp
from flux_jax.compile_cache import enable_compilation_cache
print(enable_compilation_cache())
jax.jit(lambda x: jnp.sin(x) + 1)(1.0)
"""


def run(script: str = SCRIPT, *, cwd: Path | None = None, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
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


def test_a_bucket_is_left_as_it_is(tmp_path):
    script = """
import jax
from flux_jax import compile_cache
print(compile_cache.enable_compilation_cache(), jax.config.jax_compilation_cache_dir)
print(compile_cache.lowered_folder())
"""
    address = "gs://bucket/cache"
    found = run(script, cwd=tmp_path, JAX_COMPILATION_CACHE_DIR=address)
    assert found.splitlines() == [f"{address} {address}", "None"]
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert run(XDG_CACHE_HOME=str(file)) == "None"


def test_a_user_without_a_home_is_no_error():
    script = (
        """
import pathlib
def nowhere(*given):
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = classmethod(nowhere)
"""
        + SCRIPT
    )
    assert run(script) == "None"
