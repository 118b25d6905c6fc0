"""Turn a training run into the folder that ships: diffusers' layout, bf16, files under 16 MB.

Once the training has ended:

    python -m examples.tiny_flux.export runs/tiny flux_jax/assets/tiny
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import typer
from flax import nnx
from safetensors.numpy import load_file

from examples.tiny_flux.run_files import load_parts
from examples.tiny_flux.sample import SCHEDULER
from examples.tiny_flux.tokenizers import build_tokenizers
from examples.tiny_flux.train import component_configs
from flux_jax.autoencoder import Autoencoder
from flux_jax.checkpoint import save_checkpoint
from flux_jax.clip import CLIPTextEncoder
from flux_jax.configs import AutoencoderConfig
from flux_jax.errors import UserError, exit_on_user_error
from flux_jax.t5 import T5Encoder
from flux_jax.transformer import FluxTransformer
from flux_jax.tree import split_flat

_SHARD_MB = 15


def _filled(kind: Any, config: Any, weights: dict[str, Any]) -> nnx.Module:
    """A component with these weights in bf16."""
    rebuild, params = split_flat(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    if weights.keys() != params.keys():
        odd = sorted(weights.keys() ^ params.keys())
        raise UserError(f"{kind.__name__}: the run and the model differ in {odd[:4]}")
    return rebuild({name: jnp.asarray(value, jnp.bfloat16) for name, value in weights.items()})


def load_run(run: Path) -> dict[str, nnx.Module]:
    """The four networks of a training run, by their names in a pipeline."""
    t5, clip, flux = component_configs()
    fields = json.loads((run / "autoencoder.json").read_text())
    # JSON knows no tuples.
    fields["block_out_channels"] = tuple(fields["block_out_channels"])
    vae = AutoencoderConfig(**fields)
    flow = load_parts(run, "flow")
    kinds: dict[str, tuple[Any, Any]] = {
        "transformer": (FluxTransformer, flux),
        "text_encoder": (CLIPTextEncoder, clip),
        "text_encoder_2": (T5Encoder, t5),
    }
    modules = {
        name: _filled(
            kind,
            config,
            {k.removeprefix(f"{name}."): v for k, v in flow.items() if k.startswith(f"{name}.")},
        )
        for name, (kind, config) in kinds.items()
    }
    modules["vae"] = _filled(Autoencoder, vae, load_file(run / "autoencoder.safetensors"))
    return modules


def main(
    run: Annotated[Path, typer.Argument(help="Folder that `examples.tiny_flux.train` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to be made.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """Write a training run as a diffusers pipeline."""
    from convert.cli import app as convert

    with exit_on_user_error(), tempfile.TemporaryDirectory() as scratch:
        build_tokenizers(Path(scratch))
        folders = {name: Path(scratch) / name for name in ("tokenizer", "tokenizer_2")}
        flax = Path(scratch) / "flax"
        save_checkpoint(flax, load_run(run), scheduler=SCHEDULER, tokenizers=folders)
        options = ["--to", "diffusers", "--shard-mb", str(_SHARD_MB), "--verify"]
        convert([str(flax), str(out), *options, *(["--force"] if force else [])])


if __name__ == "__main__":
    typer.run(main)
