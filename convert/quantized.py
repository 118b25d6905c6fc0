"""What `ternary` writes into checkpoints: the one place where `convert` reaches for it, late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from convert.files import read_json
from convert.safetensors_header import SUFFIX
from convert.tables import QUANTIZATION
from convert.tensors import Spec, StoredReader
from flux_jax.components import Config
from flux_jax.errors import UserError

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Sharding


@runtime_checkable
class PackedReader(StoredReader, Protocol):
    """A reader of dense parameters that are stored as packed codes, and can be loaded so too."""

    @property
    def config(self) -> Config:
        """Hyper-parameters of the component."""
        ...

    @property
    def stored(self) -> Mapping[str, Spec]:
        """Every tensor on disk."""
        ...

    def abstract_module(self, dtype: Any) -> nnx.Module:
        """What `load_module` gives, in shapes alone."""
        ...

    def load_module(
        self, dtype: Any, place: Callable[[nnx.Module], Mapping[str, Sharding]]
    ) -> nnx.Module:
        """The module with its packed weights; no dense one is ever there.

        Args:
          dtype: of what is not packed.
          place: from the module's shapes to where each parameter goes.

        Raises:
          UserError: a damaged tensor.
        """
        ...


def open_quantized(name: str, folder: Path, raw: dict[str, Any]) -> PackedReader:
    """A component's reader.

    Args:
      name: of the component.
      folder: where it is.
      raw: its `config.json`.

    Raises:
      UserError: quantised by another program, or damaged.
    """
    from ternary.storage.checkpoint import TernaryCheckpoint
    from ternary.storage.format import METHOD

    described = raw[QUANTIZATION]
    method = described.get("quant_method") if isinstance(described, dict) else None
    if name != "transformer" or method != METHOD:
        raise UserError(
            f"{folder}: a {name} quantised by {ascii(method)[:60]} is not read; expected weights "
            f"without {QUANTIZATION}, or a transformer with quant_method {METHOD!r}"
        )
    return TernaryCheckpoint(folder)


def are_latents(folder: Path) -> bool:
    """Whether a folder holds latent weights of ours, and nothing else.

    Raises:
      UserError: its index cannot be read.
    """
    from ternary.storage.latents import FORMAT, INDEX

    index = folder / INDEX
    if not index.is_file() or read_json(index).get("format") != FORMAT:
        return False
    return all(
        entry.is_file() and (entry.name == INDEX or entry.suffix == SUFFIX)
        for entry in folder.iterdir()
    )
