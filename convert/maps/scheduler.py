"""diffusers' `scheduler_config.json` to our `SchedulerConfig`, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.maps.fields import read_fields, refuse_unless
from flux_jax.configs import SchedulerConfig

_WHAT = "scheduler config"
# Options of diffusers' scheduler that would change the noise levels and are not used by FLUX.1.
_OFF = {
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
# What diffusers takes for a field that is left out.
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}


def config_from_hf(raw: Mapping[str, Any]) -> SchedulerConfig:
    """Our config from diffusers' `scheduler_config.json`.

    Raises:
      UserError: another scheduler, an option that FLUX.1 does not use, or a field of another
        type.
    """
    refuse_unless(raw, {"_class_name": "FlowMatchEulerDiscreteScheduler", **_OFF}, what=_WHAT)
    return SchedulerConfig(**read_fields(raw, SchedulerConfig, what=_WHAT, defaults=_DEFAULTS))


def config_to_hf(config: SchedulerConfig) -> dict[str, Any]:
    """A `scheduler_config.json` with which diffusers makes the same schedule."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **dataclasses.asdict(config),
        **_OFF,
    }
