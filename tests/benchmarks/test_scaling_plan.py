"""The memory plan: its arithmetic, and what it refuses."""

import dataclasses

import pytest

from benchmarks import paper, scaling_plan
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
    expected = 5 * 4608 * 3072 * 2 + 3 * widest
    assert scaling_plan.activation_bytes(config, step) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 5}, "--tokens must be a square number, got 5"),
        ({"mesh": ["9 devices"]}, "--mesh: expected one of 8 devices, fsdp 8; .*, got 9 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        scaling_plan.main(**options)
