"""Which linears become ternary, and how much of FLUX.1-dev that is."""

import pytest

from flux_jax.components import abstract_module
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.linears import linears
from flux_jax.tree import to_flat
from ternary.policy import Policy, coverage, select


@pytest.fixture(scope="module")
def dev():
    return abstract_module("transformer", FluxConfig.dev())


def test_default_covers_flux_dev(dev):
    """19 double blocks of 10 linears and 38 single blocks of 3: 99.4 % of all parameters."""
    names = select(list(linears(dev)), Policy())
    assert len(names) == 19 * 10 + 38 * 3
    assert {name.split(".")[0] for name in names} == {"double_blocks", "single_blocks"}
    counted = coverage({k: v.shape for k, v in to_flat(dev).items()}, names)
    assert counted.total == 11_901_408_320
    assert counted.ternary == 11_834_228_736
    assert counted.fraction >= 0.994


def test_exclude(dev):
    names = select(
        list(linears(dev)), Policy(include=("single_blocks.*",), exclude=("*.modulation.lin",))
    )
    assert len(names) == 76
    assert not [name for name in names if "modulation" in name]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(include=("triple_blocks.*",)), "include pattern 'triple_blocks.*' matches none"),
        (Policy(exclude=("*.qvk",)), r"exclude pattern '\*.qvk' matches none of the 314 linears"),
        (Policy(exclude=("*",)), "leaves no linear"),
    ],
)
def test_patterns_that_match_nothing_are_errors(dev, policy, message):
    with pytest.raises(UserError, match=message):
        select(list(linears(dev)), policy)


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize("value", ["double_blocks.*", None, 3, ("double_blocks.*", 3)], ids=str)
def test_patterns_are_a_tuple_of_texts(any_types, field, value):
    with pytest.raises(UserError, match=rf"{field} must be a tuple of patterns, as \('double_bl"):
        Policy(**{field: value})


def test_a_list_of_patterns_is_kept_as_a_tuple(any_types):
    policy = Policy(include=["single_blocks.*"], exclude=[])
    assert policy == Policy(include=("single_blocks.*",))
    assert hash(policy) == hash(Policy(include=("single_blocks.*",)))
