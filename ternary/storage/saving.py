"""Writing a ternary checkpoint: from a module in memory, or tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import hub, tables
from convert.replaceable import staged_folder
from convert.tensors import BFLOAT16
from convert.transforms import Shape
from flux_jax.configs import FluxConfig
from flux_jax.errors import UserError
from flux_jax.linears import linears
from flux_jax.lora import check_no_lora
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import to_flat
from pallas_kernels import unpack_codes
from ternary.config import GRANULARITIES, QuantConfig
from ternary.layers import FakeTernaryLinear, TernaryLinear
from ternary.storage.base3 import pack_base3
from ternary.storage.checkpoint import dense_shapes
from ternary.storage.format import CODES, WEIGHT, Description, expected_tensors
from ternary.storage.source import open_pipeline
from ternary.storage.tensor_file import TensorFile


def write_transformer(
    folder: Path,
    config: FluxConfig,
    quant: QuantConfig,
    layers: list[str],
    tensors: Iterator[tuple[str, np.ndarray]],
    relative_error: Mapping[str, float],
) -> None:
    """Fill a new folder with a transformer.

    Args:
      folder: to be made.
      config: of the model.
      quant: how its layers are quantised.
      layers: paths of the ternary linears.
      tensors: every stored tensor once, in any order.
      relative_error: by layer; it may be filled while the tensors are drawn.

    Raises:
      OSError: it cannot be written.
    """
    folder.mkdir()
    expected = expected_tensors(dense_shapes(config), layers, quant)
    with TensorFile(folder / tables.TERNARY_FILE, expected) as file:
        for name, values in tensors:
            file.write(name, values)
    description = Description(
        quant=quant,
        crc32={name: file.crc32[name] for name in expected},
        relative_error=relative_error,
    )
    content = {
        **tables.config_to_hf("transformer", config),
        tables.QUANTIZATION: description.to_json(),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def save_checkpoint(
    path: str | Path, transformer: FluxTransformer, *, rest: str | Path, force: bool = False
) -> None:
    """Write a ternary pipeline from a transformer in memory.

    Args:
      path: folder to be made; it appears complete or not at all.
      transformer: with `TernaryLinear`s or `FakeTernaryLinear`s, all of one `QuantConfig`.
      rest: checkpoint from which the text encoders, the autoencoder, the scheduler and the
        tokenizers are copied: usually the teacher's.
      force: replace an existing checkpoint, once the new one is whole.

    Raises:
      UserError: another module, one whose parameters are not those of its config, no ternary
        layer, layers of several kinds, LoRAs, a scale that is not finite, or a target that cannot
        be written.
    """
    if not isinstance(transformer, FluxTransformer):
        raise UserError(
            f"a ternary checkpoint holds a FluxTransformer, got {type(transformer).__name__}; "
            "save the `flax.nnx.state` of any other module"
        )
    found, quant = ternary_layers(transformer)
    _check_loadable(transformer, found)
    path = hub.local_path(path)
    with open_pipeline(rest) as pipeline, staged_folder(path, force=force) as stage:
        pipeline.write_rest(stage)
        tensors = _stored_tensors(transformer, found)
        write_transformer(
            stage / "transformer", transformer.config, quant, list(found), tensors, {}
        )


def ternary_layers(
    module: nnx.Module,
) -> tuple[dict[str, TernaryLinear | FakeTernaryLinear], QuantConfig]:
    """A module's ternary linears by path, and what of their kind is stored.

    Raises:
      UserError: it has none, or they are of several kinds, or have LoRAs beside them.
    """
    check_no_lora(module)
    found = linears(module, (TernaryLinear, FakeTernaryLinear))
    if not found:
        raise UserError(
            f"this {type(module).__name__} has no ternary linear: `ternary.make_student` makes "
            "them, and `flux_jax.save_checkpoint` writes a dense model"
        )
    kinds = {_quant_of(layer) for layer in found.values()}
    if len(kinds) != 1:
        raise UserError(
            f"a ternary checkpoint holds layers of one kind, this transformer has {len(kinds)} "
            "kinds"
        )
    return found, kinds.pop()


def stands_for(
    module: nnx.Module, layers: Mapping[str, TernaryLinear | FakeTernaryLinear]
) -> dict[str, Shape]:
    """Shapes of the dense parameters that a module with these ternary linears stands for."""
    shapes: dict[str, Shape] = {
        name: tuple(value.shape)
        for name, value in to_flat(module).items()
        if name.rpartition(".")[0] not in layers
    }
    for name, layer in layers.items():
        rows = (layer.packed if isinstance(layer, TernaryLinear) else layer.weight).shape[0]
        shapes[name + WEIGHT] = (rows, layer.in_features)
        if layer.bias is not None:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def _check_loadable(
    transformer: FluxTransformer, layers: Mapping[str, TernaryLinear | FakeTernaryLinear]
) -> None:
    """Refuse what its own config does not describe, as a transformer that has lost a block.

    Raises:
      UserError: parameters of other names or shapes.
    """
    found, expected = stands_for(transformer, layers), dense_shapes(transformer.config)
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"{len(wrong)} parameters of the transformer, as `{wrong[0]}`, are not those that its "
            "config describes, so that it could not be loaded again"
        )


def _quant_of(layer: TernaryLinear | FakeTernaryLinear) -> QuantConfig:
    """What of a layer's kind is stored."""
    if isinstance(layer, FakeTernaryLinear):
        quant = layer.config
        return QuantConfig(
            granularity=quant.granularity,
            activation_bits=quant.activation_bits,
            rank=quant.rank,
        )
    granularity = GRANULARITIES[layer.scale.ndim]
    rank = 0 if layer.low_rank_a is None else layer.low_rank_a.shape[0]
    return QuantConfig(granularity=granularity, activation_bits=layer.activation_bits, rank=rank)


def _stored_tensors(
    transformer: FluxTransformer, layers: Mapping[str, TernaryLinear | FakeTernaryLinear]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, one layer at a time."""
    for path, layer in layers.items():
        yield from stored_layer(path, layer)
    for name, value in to_flat(transformer).items():
        if name.rpartition(".")[0] not in layers:
            yield name, np.asarray(jnp.asarray(value, jnp.bfloat16))


def stored_layer(
    path: str, layer: TernaryLinear | FakeTernaryLinear
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one ternary linear, as they are stored.

    Args:
      path: of the layer in the transformer.
      layer: a fake-ternary one is frozen.

    Raises:
      UserError: a scale that is not finite.
    """
    frozen = layer.freeze() if isinstance(layer, FakeTernaryLinear) else layer
    if not np.isfinite(np.asarray(frozen.scale[...])).all():
        raise UserError(
            f"layer `{path}` has a scale that is not finite: its weights are not, or are too large "
            "for a float16 scale"
        )
    for name, value in to_flat(frozen).items():
        if name == "packed":
            # Unpacked where the array is, which may be a quick device.
            yield path + CODES, pack_base3(np.asarray(unpack_codes(value, frozen.in_features)))
        else:
            dtype = np.float16 if name == "scale" else BFLOAT16
            yield f"{path}.{name}", np.asarray(value).astype(dtype)
