"""Programs kept lowered: found again by all that they depend on, and by nothing less."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax import stored
from flux_jax.assets import TEACHER, shipped_path
from flux_jax.stored import StoredProgram, is_ours
from tests.small_pipeline import small_pipeline


class Traced:
    """A function that counts how often it is traced."""

    __name__ = "_traced"

    def __init__(self, factor=2.0):
        self.count = 0
        self.factor = factor

    def __call__(self, leaves, args):
        self.count += 1
        return jnp.sin(leaves[0]) * self.factor + args[0], args[1] is None


def program(folder, function, made_of=("a function", 1)):
    return StoredProgram(function, folder, made_of)


X, Y = jnp.linspace(0.0, 1.0, 6).reshape(2, 3), jnp.ones((1, 3))


def test_another_process_need_not_trace_it(tmp_path):
    first, second = Traced(), Traced()
    want = program(tmp_path, first)([X], (Y, None))
    again = program(tmp_path, second)
    lowered = again.lower([jax.ShapeDtypeStruct(X.shape, X.dtype)], (Y, None))
    assert "sine" in lowered.as_text()
    got = again([X], (Y, None))
    assert (first.count, second.count) == (1, 0)
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(want[0], jax.jit(Traced())([X], (Y, None))[0])
    assert want[1]
    assert got[1]


def test_whatever_it_depends_on_is_another_program(tmp_path, monkeypatch):
    function = Traced()
    program(tmp_path, function)([X], (Y, None))
    program(tmp_path, function, ("a function", 2))([X], (Y, None))
    assert function.count == 2
    program(tmp_path, function)([X[:1]], (Y, None))
    program(tmp_path, function)([X], (Y, Y))
    program(tmp_path, function)([X.astype(jnp.bfloat16)], (Y, None))
    assert function.count == 5
    with jax.default_matmul_precision("highest"):
        program(tmp_path, function)([X], (Y, None))
    assert function.count == 6
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    program(tmp_path, function)([X], (Y, None))
    monkeypatch.setattr(stored, "_packages_digest", lambda: "other sources")
    program(tmp_path, function)([X], (Y, None))
    assert function.count == 8
    assert len(list(tmp_path.iterdir())) == 8


def test_a_setting_that_changes_meanwhile_is_another_program(tmp_path):
    function = Traced()
    one = program(tmp_path, function)
    one([X], (Y, None))
    with jax.default_matmul_precision("highest"):
        one([X], (Y, None))
    one([X], (Y, None))
    assert function.count == len(list(tmp_path.iterdir())) == 2


def test_half_a_file_is_made_anew(tmp_path):
    function = Traced()
    want = program(tmp_path, function)([X], (Y, None))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert np.array_equal(program(tmp_path, function)([X], (Y, None))[0], want[0])
    assert function.count == 2
    assert path.stat().st_size == len(whole)


def test_what_was_not_used_for_long_is_removed_when_another_is_kept(tmp_path):
    program(tmp_path, Traced())([X], (Y, None))
    (path,) = tmp_path.iterdir()
    other = tmp_path / "something-else"
    other.write_text("not ours")
    os.utime(other, (0, 0))
    # Of a process that was killed, and of one that is at work.
    for name, age in ((".new-killed", 2), (".new-working", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
        os.utime(tmp_path / name, (time.time() - age * 86400,) * 2)
    for age, kept in ((80, True), (100, False)):
        os.utime(path, (time.time() - age * 86400,) * 2)
        program(tmp_path, Traced(), (age,))([X], (Y, None))
        assert path.exists() == kept
    assert other.exists()
    assert [path.name for path in tmp_path.glob(".new-*")] == [".new-working"]


def test_a_program_that_is_found_counts_as_used(tmp_path):
    program(tmp_path, Traced())([X], (Y, None))
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))
    program(tmp_path, Traced())([X], (Y, None))
    program(tmp_path, Traced(), ("another",))([X], (Y, None))
    assert path.exists()


def test_what_a_program_does_not_need_is_no_argument_of_it(tmp_path):
    """Else an offloaded transformer's modulation layers would go to the device at every step."""

    def first(leaves, args):
        return leaves[0] + args[0]

    arguments = [X, jnp.ones((64, 64))], (Y, None)

    def nbytes(program):
        return program.lower(*arguments).compile().memory_analysis().argument_size_in_bytes

    for _ in ("made", "found again"):
        assert nbytes(program(tmp_path, first)) == nbytes(jax.jit(first)) < 64 * 64
        assert np.array_equal(program(tmp_path, first)(*arguments), X + Y)


# Two programs of which one calls a Mosaic kernel, as one process keeps them and another finds them.
RUNTIME_SCRIPT = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from flux_jax.stored import StoredProgram, _environment
before = _environment()
def plain(leaves, args):
    return leaves[0] + 1
def kernel(leaves, args):
    x = leaves[0]
    return jax.ffi.ffi_call("mosaic_gpu_v2", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
name = "jax.experimental.mosaic.gpu"
for function in (plain, kernel):
    StoredProgram(function, Path(sys.argv[1]), ()).lower([jnp.ones(3)], ())
    print(function.__name__, name in sys.modules)
assert _environment() == before
"""


def test_a_program_found_again_has_its_kernels_runtime(tmp_path):
    """Its model's code, which would have imported it, does not run. And the import, which sets
    variables of the environment, does not change the names of the programs that come after."""
    for _ in range(2):
        command = [sys.executable, "-c", RUNTIME_SCRIPT, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert result.stdout.split() == ["plain", "False", "kernel", "True"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    function = Traced()
    program(file, function)([X], (Y, None))
    assert function.count


def test_what_cannot_be_exported_runs_all_the_same(tmp_path):
    def back(leaves, args):
        shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) + 1, shape, leaves[0])

    assert np.array_equal(program(tmp_path, back)([X], ()), np.asarray(X) + 1)
    assert not list(tmp_path.iterdir())


def test_only_modules_of_known_sources_are_stored():
    class Mine(nnx.Module):
        def __init__(self, part):
            self.part = part

    transformer = small_pipeline(dtype=jnp.float32).transformer
    assert is_ours(transformer)
    transformer.img_in = Mine(transformer.img_in)
    assert not is_ours(transformer)


SCRIPT = """
import sys, numpy as np
from flux_jax import transformer
from flux_jax.compile_cache import enable_compilation_cache
from flux_jax.pipeline import FluxPipeline
enable_compilation_cache()
traced, run = [], transformer.rotary_angles
def count(*args):
    traced.append(args)
    return run(*args)
transformer.rotary_angles = count
pipe = FluxPipeline.from_pretrained(sys.argv[1], dtype="float32")
call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
np.save(sys.argv[2], pipe("a red circle", seed=1, progress=False, **call).images)
print(len(traced))
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_second_process_draws_the_same_without_the_model_s_code(tmp_path):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    traced, images = [], []
    for name in ("first.npy", "second.npy"):
        command = [sys.executable, "-c", SCRIPT, str(shipped_path(TEACHER)), str(tmp_path / name)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        traced.append(int(result.stdout))
        images.append(np.load(tmp_path / name))
    assert np.array_equal(*images)
    assert traced == [1, 0]
