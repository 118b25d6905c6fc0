"""Compiled programs kept on disk from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

# What `flux_jax.stored` keeps, in the cache's folder.
LOWERED = "lowered"

# Set to a folder to use that one, or to "off".
VARIABLE = "FLUX_JAX_COMPILATION_CACHE"

# The folder, once it is turned on.
_enabled: list[Path] = []


def default_folder() -> Path:
    """`flux_jax/compiled` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flux_jax" / "compiled"


def enable_compilation_cache() -> Path | str | None:
    """Turn on JAX's persistent compilation cache for every program, however fast it compiled.

    JAX's own thresholds leave out what compiles within a second, which is most of a pipeline. A
    cache that JAX was already told of (`JAX_COMPILATION_CACHE_DIR`, or `jax.config`) is kept;
    `FLUX_JAX_COMPILATION_CACHE` names another folder, or turns the cache off. Lowered programs are
    kept beside it only in a folder of this machine's, and not in a bucket ("gs://...").

    Returns:
      The folder in use, or the bucket's address; None if off or if the folder cannot be made.
    """
    wanted = os.environ.get(VARIABLE, "")
    config: Any = jax.config
    if wanted.lower() in ("off", "0", "no"):
        jax.config.update("jax_compilation_cache_dir", None)
        _enabled.clear()
        return None
    named = wanted or config.jax_compilation_cache_dir
    if "://" in str(named):
        place = str(named)
        _enabled.clear()
    else:
        try:
            place = Path(named or default_folder()).expanduser()
            place.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            # A read-only home, or none, is no reason not to draw.
            return None
        _enabled[:] = [place]
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return place


def lowered_folder() -> Path | None:
    """Where lowered programs are kept, beside the compiled ones; None unless turned on above."""
    return _enabled[0] / LOWERED if _enabled else None
