"""The `config.json` of a Flax checkpoint of ours (docs/convert.md has the layout around it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import tables
from convert.maps import scheduler
from convert.problems import naming
from flux_jax.components import Config
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError

FORMAT = "flux_jax"
FORMAT_VERSION = 1


def write_config(
    folder: Path, configs: Mapping[str, Config], schedule: SchedulerConfig | None
) -> None:
    """Write the file.

    Args:
      folder: of the checkpoint.
      configs: of its components, by name.
      schedule: None where there is none.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "components": {name: tables.config_to_json(config) for name, config in configs.items()},
        "scheduler": None if schedule is None else tables.config_to_json(schedule),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def parse_config(
    file: Path, raw: Mapping[str, Any]
) -> tuple[dict[str, Config], SchedulerConfig | None]:
    """The configs of the components, and the noise schedule if there is one.

    Args:
      file: for messages.
      raw: its content.

    Raises:
      UserError: another version, or wrong fields.
    """
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {raw.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; update it, or convert again"
        )
    stored = raw.get("components")
    if not isinstance(stored, dict):
        raise UserError(f"{file}: has no `components`")
    with naming(file):
        tables.check_components(list(stored))
        configs = {
            name: tables.config_from_json(name, fields, what=name)
            for name, fields in stored.items()
        }
        fields = raw.get("scheduler")
        if fields is None:
            return configs, None
        if not isinstance(fields, dict):
            raise UserError(f"scheduler must be an object or null, got {type(fields).__name__}")
        return configs, scheduler.config_from_hf(fields)
