"""The memory plan: its arithmetic, and what it refuses."""

import dataclasses
import os
import subprocess
import sys

import pytest

from benchmarks import compile_only, paper, scaling_plan
from benchmarks.scaling_plan import Bytes
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError


def test_blocks_are_added_to_a_base():
    """A base of 100, 10 a double block and 3 a single one."""
    found = {
        (doubles, singles): Bytes(arguments=100 + 10 * doubles + 3 * singles, work=7.0 * doubles)
        for doubles, singles in scaling_plan.DEPTHS
    }
    whole = scaling_plan.extrapolated(found, (19, 38))
    assert whole.arguments == 100 + 10 * 19 + 3 * 38
    assert whole.work == 7 * 19


def test_activations_by_hand():
    config = dataclasses.replace(FluxConfig.dev(), depth=2, depth_single_blocks=3)
    step = paper.Step()
    widest = sum(paper.activation_bytes(config, step).values())
    # Two of 4: input, two gated products, attention; three of 3.
    expected = (2 * 4 + 3 * 3) * 4608 * 3072 * 2 + 3 * widest
    assert scaling_plan.activation_bytes(config, step) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 200}, "--width must be a multiple of 128, got 200"),
        ({"mesh": ["9 devices"]}, "--mesh: expected one of 2 devices, fsdp 2; .*, got 9 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        scaling_plan.main(**options)


def test_without_the_plugin_there_is_another_way(monkeypatch):
    monkeypatch.setattr(compile_only.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs JAX's CUDA plugin.*--cpu plans for simulated CPU"):
        scaling_plan.main()


@pytest.mark.parametrize("count", [0, 12])
def test_hosts_are_whole(count):
    with pytest.raises(ValueError, match=f"1 to 8 or a multiple of it, got {count}"):
        compile_only.gpus(count)


def test_a_program_for_gpus_that_are_not_here():
    """In a process of its own: the tests' keeps to CPUs, and to flags that GPUs do not know."""
    try:
        compile_only.check_plugin()
    except UserError as error:
        pytest.skip(str(error))
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from benchmarks.compile_only import gpus
mesh = Mesh(np.array(gpus(16)), ("d",))
x = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=NamedSharding(mesh, P("d")))
stats = jax.jit(lambda x: (x * 2).sum()).lower(x).compile().memory_analysis()
print(stats.argument_size_in_bytes)
"""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == 1024 * 512 * 4 // 16
