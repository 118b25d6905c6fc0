"""Reading a `config.json` that anybody may have written."""

from __future__ import annotations

import dataclasses

import pytest

from convert.maps.fields import read_fields, refuse_unless
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    size: int
    sizes: tuple[int, ...]
    scale: float
    on: bool
    kind: str
    zero: int = 7


RAW = {"size": 3, "sizes": [1, 2], "scale": 1, "on": False, "kind": "a", "zero": 0, "other": None}


def read(**changes):
    return read_fields(
        {**RAW, **changes},
        Config,
        what="config of x",
        defaults={"scale": 0.5},
        may_be_zero=("zero",),
    )


def test_fields_are_read_and_the_rest_is_left_alone():
    assert read() == {
        "size": 3,
        "sizes": (1, 2),
        "scale": 1,
        "on": False,
        "kind": "a",
        "zero": 0,
    }


def test_null_and_absent_take_the_default():
    assert read(scale=None)["scale"] == 0.5
    raw = {name: value for name, value in RAW.items() if name != "scale"}
    assert read_fields(raw, Config, what="x", defaults={"scale": 0.5}, may_be_zero=("zero",)) == {
        **read(),
        "scale": 0.5,
    }


def test_no_model_is_built_of_a_million_layers():
    """A config is believed before a tensor is seen."""
    raw = dataclasses.asdict(FluxConfig.dev())
    assert read_fields(raw, FluxConfig, what="x")["depth"] == 19
    with pytest.raises(UserError, match="x: depth must be at most 256, got 1000000"):
        read_fields({**raw, "depth": 10**6}, FluxConfig, what="x")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", None, "size is missing"),
        ("size", 10**12, "size must be a positive integer, got 1000000000000"),
        ("scale", 10**400, "scale must be a finite number, got 1000"),
        ("sizes", [1] * 300, "sizes must be at most 256, got 300"),
        ("zero", None, "zero is missing"),  # the dataclass' own default is not the library's
        ("size", 0, "size must be a positive integer, got 0"),
        ("size", -1, "size must be a positive integer, got -1"),
        ("size", True, "size must be a positive integer, got True"),
        ("size", 1.5, "size must be a positive integer, got 1.5"),
        ("zero", -1, "zero must be a positive integer, got -1"),
        ("sizes", [1, "2"], r"sizes must be a list of positive integers, got \[1, '2'\]"),
        ("sizes", 4, r"sizes must be a list of positive integers, got 4"),
        ("scale", "1", "scale must be a finite number, got '1'"),
        ("scale", True, "scale must be a finite number, got True"),
        ("scale", float("nan"), "scale must be a finite number, got nan"),
        ("scale", float("-inf"), "scale must be a finite number, got -inf"),
        ("on", 1, "on must be true or false, got 1"),
        ("kind", 1, "kind must be a string, got 1"),
        ("kind", ["x" * 100], r"kind must be a string, got \['x{38}$"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(UserError, match=f"^config of x: {message}"):
        read(**{field: value})


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError, match="size must be .*; on is missing; kind must be"):
        read(size="3", on=None, kind=2)


def test_a_field_without_choice():
    refuse_unless({"act": "silu"}, {"act": "silu", "absent": 1}, what="x")
    with pytest.raises(UserError, match="^x: not supported: act must be 'silu', got 'relu'$"):
        refuse_unless({"act": "relu"}, {"act": "silu"}, what="x")
