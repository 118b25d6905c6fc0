"""The settings of a distillation run, as one YAML file holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flux_jax import arguments
from flux_jax.errors import UserError
from flux_jax.sharding import MeshConfig
from ternary.config import DistillConfig, QuantConfig, TrajectoryConfig, check_counts, store
from ternary.policy import Policy

T = TypeVar("T")

# So many characters of a value are shown in a message.
SHOWN = 60
# The pool of trajectories keeps the seed as int32.
SEED_LIMIT = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, and the mesh it computes it on.

    Attributes:
      quant, policy: what becomes ternary, and how.
      trajectory: where the states come from.
      distill: how the student is trained.
      mesh: how the devices are laid out; a run may go on on another.
      batch_size: states of one group of trajectories, over all devices.
      seed: of every draw of the trajectories. Held-out pictures have seeds of their own, from 0 on.
      height, width: pixels of the pictures whose trajectories are followed; None for the model's.
      max_sequence_length: T5 tokens of a prompt; None for the model's.
      held_out: prompts of the file that are kept from training, to be drawn; not used where
        held-out prompts are given apart.
      sample_every: steps between two drawings of the held-out prompts; 0 for none between those
        before the first step and after the last.
      sampling_steps: steps of those drawings.
      guidance_scale: guidance of those drawings.
      sample_batch_size: images of them drawn together.
      log_every: steps between two looks at the metrics.
      checkpoint_every: steps between two checkpoints.
      checkpoints: how many checkpoints are kept.
    """

    quant: QuantConfig = QuantConfig()
    policy: Policy = Policy()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    distill: DistillConfig = DistillConfig()
    mesh: MeshConfig = MeshConfig()
    batch_size: int = 8
    seed: int = 0
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    held_out: int = 16
    sample_every: int = 2000
    sampling_steps: int = 28
    guidance_scale: float = 3.5
    sample_batch_size: int = 1
    log_every: int = 20
    checkpoint_every: int = 500
    checkpoints: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if dataclasses.is_dataclass(kind) and not isinstance(value, kind):
                raise UserError(f"{field.name} must be a {kind.__name__}, got {_shown(value)}")
        check_counts(self, "batch_size", "log_every", "checkpoint_every", "checkpoints")
        check_counts(self, "sampling_steps", "sample_batch_size")
        check_counts(self, "held_out", "sample_every", "seed", least=0)
        for name in ("height", "width", "max_sequence_length"):
            if getattr(self, name) is not None:
                check_counts(self, name)
        store(self, "guidance_scale", arguments.scale("guidance_scale", self.guidance_scale))
        if self.seed >= SEED_LIMIT:
            raise UserError(f"seed must be below 2**31, got {self.seed}")


def read_run_config(path: Path | None, changes: Sequence[str] = ()) -> RunConfig:
    """A run's settings from a YAML file, with single values changed.

    Args:
      path: the file; None for the defaults.
      changes: "distill.steps=2000" and the like; the values are YAML.

    Raises:
      UserError: no such file, no mapping, a key that does not exist, or a value out of range.
    """
    content: Any = {}
    if path is not None:
        try:
            content = load_yaml(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise UserError(f"cannot read the settings {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"cannot read the settings {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"the settings {path} must be a mapping, got a {type(content).__name__}")
    try:
        for change in changes:
            _change(content, change)
        return _build(RunConfig, content, "")
    except RecursionError:
        raise UserError("a value of the settings is a part of itself") from None


class _Loader(yaml.SafeLoader):
    """Refuses what a mapping would drop and what no float can hold."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise UserError(f"the mapping in line {line} has the key {_shown(twice)} twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        float(value)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
      UserError: it is none, says something twice, or has a value that is none.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"it is not YAML: {error}") from None
    # What PyYAML's constructors raise of a value that only looks like one of their kind.
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise UserError(f"a value cannot be read: {str(e) or type(e).__name__}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise UserError(f"a setting is changed by KEY=VALUE, as distill.steps=2000; got {change!r}")
    *parents, last = key.split(".")
    inner: Any = content
    for parent in parents:
        inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"setting {parent!r} has no parts, got {change!r}")
    try:
        inner[last] = _numbers(load_yaml(text))
    except UserError as error:
        raise UserError(f"cannot read the value of {_shown(change)}: {error}") from None


def _build(kind: type[T], content: Mapping[str, Any], where: str) -> T:
    """A config dataclass from a mapping, its inner configs likewise."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in fields:
            raise UserError(
                f"unknown setting {where + str(name)!r}; there are: {', '.join(sorted(fields))}"
            )
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise UserError(f"setting {where + name!r} must be a mapping, got {_shown(value)}")
            value = _build(type(default), value, f"{where}{name}.")
        else:
            value = _checked(where + name, _numbers(value), default)
        values[name] = value
    return kind(**values)


def _checked(name: str, value: Any, default: Any) -> Any:
    """`value` if it is of the default's kind; whole numbers serve as floats."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        # Patterns, of which there may be none, are texts.
        like = default[0] if default else ""
        return tuple(_checked(name, item, like) for item in value)
    kind = (int, type(None)) if default is None else type(default)
    if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(default, bool)):
        expected = "a whole number" if default is None else f"like {default!r}"
        raise UserError(f"setting {name!r} must be {expected}, got {_shown(value)}")
    return value


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for text; people do not."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def to_yaml(config: RunConfig, **more: Any) -> str:
    """The settings as YAML, every one of them; `more` in front."""
    return yaml.safe_dump(_lists({**more, **dataclasses.asdict(config)}), sort_keys=False)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two settings, as "distill.steps: 100 -> 200"."""
    found = []
    for key in sorted({**old, **new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{where}{key}.")
        elif before != after:
            found.append(f"{where}{key}: {before} -> {after}")
    return found
