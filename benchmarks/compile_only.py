"""GPUs that programs can be compiled for where there are none: XLA's own compiler, no device.

Needs JAX's CUDA plugin (`pip install -e ".[cuda13]"`), which installs anywhere.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError

_TARGETS = Path(__file__).parent / "targets"
# Of one host.
_DEVICES = 8


def check_plugin() -> None:
    """Raises UserError where JAX's CUDA plugin is not installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    names = ("xla_cuda13", "xla_cuda12")
    if plugins is None or not any(importlib.util.find_spec(f"jax_plugins.{n}") for n in names):
        raise UserError(
            "compiling for GPUs needs JAX's CUDA plugin, on a machine without a GPU too: "
            'pip install -e ".[cuda13]"; --cpu plans for simulated CPU devices'
        )


def gpus(count: int, kind: str = "nvidia_h200") -> list[Any]:
    """Devices that nothing can run on, but XLA compiles for; hosts have eight each.

    Args:
      count: up to 8, or a multiple of 8.
      kind: a file of `benchmarks/targets`: XLA's description of the card.

    Raises:
      UserError: the plugin is missing.
      ValueError: another count.
    """
    if count < 1 or (count > _DEVICES and count % _DEVICES):
        raise ValueError(f"count must be 1 to {_DEVICES} or a multiple of it, got {count}")
    check_plugin()
    import jax
    from jax.experimental import topologies

    # Plugins are found when devices are first asked for, whatever devices those are.
    jax.devices()
    hosts = max(1, count // _DEVICES)
    topology = topologies.get_topology_desc(
        kind,
        platform="cuda",
        target_config=(_TARGETS / f"{kind}.textproto").read_text(encoding="utf-8"),
        topology=f"1x{hosts}x{count // hosts}",
    )
    return list(topology.devices)
