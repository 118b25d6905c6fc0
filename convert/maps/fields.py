"""Reading the fields of a component's `config.json`, which anybody may have written."""

import dataclasses
import types
import typing
from collections.abc import Container, Mapping
from typing import Any

from flux_jax.errors import UserError
from flux_jax.json_values import fits


def read_fields(
    raw: Mapping[str, Any],
    config_class: type,
    *,
    what: str,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    may_be_zero: Container[str] = (),
) -> dict[str, Any]:
    """The fields of `config_class` that `raw` holds under the same names; lists become tuples.

    Args:
      raw: A parsed `config.json`; other keys in it are left alone.
      config_class: dataclass whose fields are wanted.
      what: what is being read, for the message.
      defaults: what the library that wrote the file takes for a field it leaves out or sets to
        null. Fields without a default must be present.
      may_be_zero: integer fields that need not be positive.

    Raises:
      UserError: fields that are missing or of another type, all in one line.
    """
    kinds = typing.get_type_hints(config_class)
    values, problems = {}, []
    for field in dataclasses.fields(config_class):
        value = raw.get(field.name)
        value = defaults.get(field.name) if value is None else value
        kind = kinds[field.name]
        if value is None:
            problems.append(f"{field.name} is missing")
        elif not fits(value, kind, 0 if field.name in may_be_zero else 1):
            problems.append(f"{field.name} must be {_KIND_NAMES[kind]}, got {repr(value)[:40]}")
        elif (field.name in _LAYERS and value > _MOST_LAYERS) or (
            isinstance(value, list | tuple) and len(value) > _MOST_LAYERS
        ):
            size = value if isinstance(value, int) else len(value)
            problems.append(f"{field.name} must be at most {_MOST_LAYERS}, got {size}")
        else:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}")
    return values


def refuse_unless(raw: Mapping[str, Any], expected: Mapping[str, Any], *, what: str) -> None:
    """Check the fields in which the model has no choice.

    Args:
      raw: A parsed `config.json`.
      expected: field to the one supported value. A field that `raw` leaves out is not checked.
      what: what is being read, for the message.

    Raises:
      UserError: fields of another value, all in one line.
    """
    problems = [
        f"{name} must be {value!r}, got {repr(raw[name])[:60]}"
        for name, value in expected.items()
        if name in raw and raw[name] != value
    ]
    if problems:
        raise UserError(f"{what}: not supported: {'; '.join(problems)}")


# Far above any model's. A config is believed before a tensor is seen, and layers are built one by
# one: a million of them would take hours.
_MOST_LAYERS = 256
_LAYERS = ("depth", "depth_single_blocks", "num_layers", "num_hidden_layers", "layers_per_block")

_KIND_NAMES: dict[Any, str] = {
    int: "a positive integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    tuple[int, ...]: "a list of positive integers",
}
