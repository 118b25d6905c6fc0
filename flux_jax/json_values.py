"""JSON that anybody may have written: parsed, and its values held against a dataclass' types."""

from __future__ import annotations

import json
import math
import types
import typing
from typing import Any

from flux_jax.errors import UserError

# No number of any model's is beyond them.
_MOST, _MOST_FLOAT = 2**31, 1e300


def parse_json(text: str | bytes, what: object) -> Any:
    """What a JSON text says.

    Args:
      text: bytes are UTF-8.
      what: where it is from, for the message.

    Raises:
      UserError: it is no JSON, is nested too deeply, or has a number of more digits than Python
        reads.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (line {error.lineno}, column {error.colno})"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except ValueError:
        reason = "a number has too many digits"
    except RecursionError:
        reason = "nested too deeply"
    raise UserError(f"{what}: not valid JSON: {reason}")


def fits(value: Any, kind: Any, least: int | None = None) -> bool:
    """Whether a value, as JSON has it, is one of a field's type; a list is a tuple.

    Args:
      value: any.
      kind: a type or union as `typing.get_type_hints` gives it; a float is finite and may be
        written as an integer.
      least: smallest integer; none is too small, or too large, by default.
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, one, least) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(fits(v, item, least) for v in value)
    if isinstance(value, bool):
        # Python's True is an int.
        return kind is bool
    if kind is float:
        # Python's JSON knows NaN and Infinity, and integers beyond any float.
        number = isinstance(value, int | float)
        return number and abs(value) < _MOST_FLOAT and math.isfinite(value)
    if kind is int and least is not None:
        return isinstance(value, int) and least <= value < _MOST
    return isinstance(value, kind)


def kind_name(kind: Any) -> str:
    """A type as a signature writes it."""
    return kind.__name__ if type(kind) is type else str(kind)
