"""JSON that anybody may have written: one line for what is wrong, types as dataclasses say them."""

from __future__ import annotations

import pytest

from flux_jax.errors import UserError
from flux_jax.json_values import fits, kind_name, parse_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name .*line 1, column 2"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "a number has too many digits"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(text, reason):
    with pytest.raises(UserError, match=f"^x: not valid JSON: {reason}") as raised:
        parse_json(text, "x")
    assert "\n" not in str(raised.value)


def test_text_and_bytes_are_parsed():
    assert parse_json('{"a": [1, null]}', "x") == parse_json(b'{"a": [1, null]}', "x")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -1, 10**30], [True, 1.0, "1", None, [1]]),
        (float, [0, 0.5, -1e200], [False, "1", float("nan"), float("inf"), 10**400, None]),
        (bool, [True, False], [0, 1, None, "true"]),
        (str, ["", "a"], [None, 1, ["a"]]),
        (int | None, [None, 3], [True, "3", 0.5]),
        (bool | None, [None, True], [0, 1]),
        (tuple[str, ...], [[], ["a"], ("a",)], ["a", [1], None, ["a", None]]),
    ],
)
def test_values_of_a_type(kind, good, bad):
    assert all(fits(value, kind) for value in good)
    assert not any(fits(value, kind) for value in bad)


def test_integers_with_a_bound():
    assert [n for n in (-1, 0, 1, 2**31 - 1, 2**31) if fits(n, int, 1)] == [1, 2**31 - 1]
    assert not fits([1, 0], tuple[int, ...], 1)


def test_a_type_is_named_as_a_signature_writes_it():
    kinds = (int, int | None, tuple[str, ...])
    assert [kind_name(kind) for kind in kinds] == ["int", "int | None", "tuple[str, ...]"]
