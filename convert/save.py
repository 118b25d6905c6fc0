"""A Flax checkpoint from modules in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from convert import hub, tables
from convert.engine import full_disk_explained
from convert.flax_config import write_config
from convert.orbax_write import write_checkpoint
from convert.replaceable import staged_folder
from convert.targets import copy_tokenizers
from convert.tensors import Spec
from flux_jax.components import TOKENIZERS
from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.layers import AnyLinear, Linear
from flux_jax.linears import linears
from flux_jax.tree import to_flat


class _Arrays:
    """A reader of arrays on devices; one is on the host at a time."""

    def __init__(self, arrays: Mapping[str, jax.Array]):
        self._arrays = arrays
        self._host: tuple[str, np.ndarray] | None = None
        self.specs = {name: Spec(a.shape, np.dtype(a.dtype)) for name, a in arrays.items()}

    def read_into(self, name: str, row: int, out: np.ndarray) -> None:
        if self._host is None or self._host[0] != name:
            spec = self.specs[name]
            whole = np.asarray(self._arrays[name]).reshape(spec.rows, *spec.row_shape)
            self._host = (name, whole)
        out[...] = self._host[1][row : row + out.shape[0]]


def save(
    path: str | Path,
    modules: Mapping[str, nnx.Module],
    scheduler: SchedulerConfig | None,
    tokenizers: Mapping[str, str | Path],
    *,
    force: bool,
) -> None:
    """See `flux_jax.checkpoint.save_checkpoint`."""
    tables.check_components(list(modules))
    configs: dict[str, Any] = {name: getattr(m, "config", None) for name, m in modules.items()}
    without = [name for name, config in configs.items() if config is None]
    if without:
        raise UserError(f"{', '.join(without)}: a module without `config` cannot be saved")
    for name, module in modules.items():
        _check_loadable(name, module, configs[name])
    folders = {name: hub.local_path(folder) for name, folder in tokenizers.items()}
    for name, folder in folders.items():
        if name not in TOKENIZERS or not folder.is_dir():
            raise UserError(
                f"tokenizers must be folders by name, of {' and '.join(TOKENIZERS)}; got "
                f"{name!r}: {folder}"
            )
    path = hub.local_path(path)
    with staged_folder(path, force=force) as stage:
        with full_disk_explained(path):
            copy_tokenizers(folders, stage)
            for name, module in modules.items():
                write_checkpoint(stage / name, _Arrays(to_flat(module)))
        write_config(stage, configs, scheduler)


def _check_loadable(name: str, module: nnx.Module, config: Any) -> None:
    """Refuses a module that a checkpoint of dense weights could not give back.

    Raises:
      UserError: a linear that is not dense, or parameters of other names or shapes than its config
        says.
    """
    # First: the latent weights of a student have the names and shapes of dense ones.
    for path, linear in linears(module, AnyLinear).items():
        if not isinstance(linear, Linear):
            raise UserError(
                f"{name}: its linears, as `{path}`, a {type(linear).__name__}, are not those of a "
                f"dense {name}, as which it would be loaded again; `ternary.save_checkpoint` "
                "writes a ternary one"
            )
    shapes = {key: tuple(array.shape) for key, array in to_flat(module).items()}
    expected = tables.our_shapes(name, config)
    wrong = sorted(
        key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key)
    )
    if wrong:
        raise UserError(
            f"{name}: {len(wrong)} parameters, as `{wrong[0]}`, are not those of a dense {name}, "
            "so that it could not be loaded again; `ternary.save_checkpoint` writes a ternary one"
        )
