"""LoRA files of several ecosystems, against diffusers and PEFT with the same file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.maps import transformer as transformer_map
from flux_jax.checkpoint import load_lora, save_lora
from flux_jax.configs import FluxConfig
from flux_jax.lora import attach, detach, linear_shapes
from flux_jax.transformer import FluxTransformer
from tests.lora_files import random_factors as small_factors
from tests.lora_files import write_lora
from tests.parity.common import TOLERANCE, ours, perturb_vectors, relative_error, run
from tests.parity.test_transformer import diffusers_arguments, draw, positional

peft = pytest.importorskip("peft")

CONFIG = dataclasses.replace(FluxConfig.tiny(), depth=2, depth_single_blocks=2)
# Every linear of the model: whatever a trainer may have chosen.
ALL_LINEARS = "all-linear"
RANK = 4


@pytest.fixture
def models(tmp_path):
    """diffusers' model and ours with the same weights."""
    torch.manual_seed(0)
    fields = transformer_map.config_to_hf(CONFIG)
    model = diffusers.FluxTransformer2DModel.from_config(fields).eval()
    perturb_vectors(model, seed=1)
    return model, ours(model, "transformer", "float32", tmp_path / "transformer")


def random_factors(module: torch.nn.Module) -> None:
    """PEFT starts with one factor of zeros."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def check(
    model: torch.nn.Module,
    transformer: FluxTransformer,
    path: Path,
    scale: float = 1.0,
    least: float = 0.02,
) -> None:
    """Ours with the file is diffusers' with its adapter, and without it what it was."""
    inputs = draw(CONFIG, 2, 4, 3, 5)
    before = np.asarray(run(FluxTransformer.__call__, transformer, *positional(inputs)))
    with torch.no_grad():
        expected = model(**diffusers_arguments(inputs), return_dict=False)[0]
    attach(transformer, load_lora(path, CONFIG, scale=scale))
    found = run(FluxTransformer.__call__, transformer, *positional(inputs))
    assert relative_error(found, expected) < TOLERANCE["float32"]
    assert relative_error(before, expected) > least
    detach(transformer)
    after = run(FluxTransformer.__call__, transformer, *positional(inputs))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves(models, tmp_path, rslora):
    """With PEFT's settings: the scale is alpha over the rank, or its root, and another for some."""
    model, transformer = models
    model.add_adapter(
        peft.LoraConfig(
            r=RANK,
            lora_alpha=6,
            target_modules=ALL_LINEARS,
            alpha_pattern={"attn.to_k": 3, "transformer_blocks.1.ff.net.2": 1},
            rank_pattern={"proj_mlp": 2},
            use_rslora=rslora,
        )
    )
    random_factors(model)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path / "lora",
        peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    stored = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    # The single blocks' q, k, v and MLP are one weight of ours, with a rank each.
    assert {t.shape[0] for n, t in stored.items() if n.endswith("lora_A.weight")} == {2, RANK}
    check(model, transformer, tmp_path / "lora")


def test_an_adapter_alone(models, tmp_path):
    """Of a model, not of a pipeline: its settings have no component before their names."""
    model, transformer = models
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=["to_q", "proj_mlp"]))
    random_factors(model)
    model.save_lora_adapter(tmp_path / "lora")
    check(model, transformer, tmp_path / "lora", least=0.005)


def test_patterns_of_whole_names(models, tmp_path):
    """As diffusers makes them of a file with several ranks."""
    model, transformer = models
    config = {"r": RANK, "lora_alpha": 2, "target_modules": ["proj_out", "to_q"]}
    model.add_adapter(peft.LoraConfig(**config, alpha_pattern={"^proj_out": 12}))
    random_factors(model)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path / "lora",
        peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    check(model, transformer, tmp_path / "lora", least=0.005)


def test_what_peft_saves(models, tmp_path):
    """A folder with its settings beside the weights."""
    model, transformer = models
    config = peft.LoraConfig(r=RANK, lora_alpha=10, target_modules=["to_q", "proj_mlp", "linear"])
    wrapped = peft.get_peft_model(model, config)
    random_factors(wrapped)
    wrapped.save_pretrained(tmp_path / "lora")
    check(model, transformer, tmp_path / "lora", least=0.005)


def test_what_we_write(models, tmp_path):
    """diffusers with our file draws what we do."""
    model, transformer = models
    shapes = linear_shapes(CONFIG)
    lora = load_lora(write_lora(tmp_path / "in.safetensors", small_factors(shapes)), CONFIG)
    save_lora(tmp_path / "out.safetensors", lora, CONFIG)
    model.load_lora_adapter(load_file(tmp_path / "out.safetensors"), prefix="transformer")
    check(model, transformer, tmp_path / "in.safetensors")


def test_scale_multiplies(models, tmp_path):
    model, transformer = models
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ALL_LINEARS))
    random_factors(model)
    factors = peft.get_peft_model_state_dict(model)
    # Without settings: alpha is the rank.
    save_file({f"transformer.{n}": t for n, t in factors.items()}, tmp_path / "lora.safetensors")
    model.set_adapters(["default"], [-0.5])
    check(model, transformer, tmp_path / "lora.safetensors", scale=-0.5)


def foreign(path: Path, names: dict[str, tuple[int, int]], down: str, up: str, alpha: str | None):
    """A file in another ecosystem's names, of weights of these shapes."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors[name + down] = 0.1 * torch.randn((RANK, columns), generator=generator)
        tensors[name + up] = 0.1 * torch.randn((rows, RANK), generator=generator)
        if alpha is not None:
            tensors[name + alpha] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def in_diffusers(model: torch.nn.Module, path: Path) -> None:
    """Load a file as a user of diffusers does."""
    found, alphas = diffusers.FluxPipeline.lora_state_dict(str(path), return_alphas=True)
    model.load_lora_adapter(found, network_alphas=alphas)


def bfl_shapes() -> dict[str, tuple[int, int]]:
    """Of the linears that sd-scripts trains, by Black Forest Labs' names."""
    width, hidden = CONFIG.hidden_size, CONFIG.mlp_hidden
    shapes = {}
    for block in range(CONFIG.depth):
        for stream in ("img", "txt"):
            at = f"double_blocks.{block}.{stream}"
            shapes[f"{at}_attn.qkv"] = (3 * width, width)
            shapes[f"{at}_attn.proj"] = (width, width)
            shapes[f"{at}_mlp.0"] = (hidden, width)
            shapes[f"{at}_mlp.2"] = (width, hidden)
            shapes[f"{at}_mod.lin"] = (6 * width, width)
    for block in range(CONFIG.depth_single_blocks):
        at = f"single_blocks.{block}"
        shapes[f"{at}.linear1"] = (3 * width + hidden, width)
        shapes[f"{at}.linear2"] = (width, width + hidden)
        shapes[f"{at}.modulation.lin"] = (3 * width, width)
    return shapes


def test_kohya(models, tmp_path):
    model, transformer = models
    names = {f"lora_unet_{n.replace('.', '_')}": shape for n, shape in bfl_shapes().items()}
    # diffusers splits `linear1` by FLUX.1-dev's own sizes, so a small model's is left out.
    names = {n: shape for n, shape in names.items() if not n.endswith("linear1")}
    path = foreign(
        tmp_path / "kohya.safetensors", names, ".lora_down.weight", ".lora_up.weight", ".alpha"
    )
    in_diffusers(model, path)
    check(model, transformer, path)


def test_xlabs(models, tmp_path):
    model, transformer = models
    width = CONFIG.hidden_size
    names = {}
    for block in range(CONFIG.depth):
        for number in (1, 2):
            at = f"double_blocks.{block}.processor"
            names[f"{at}.qkv_lora{number}"] = (3 * width, width)
            names[f"{at}.proj_lora{number}"] = (width, width)
    for block in range(CONFIG.depth_single_blocks):
        at = f"single_blocks.{block}.processor"
        names[f"{at}.qkv_lora"] = (3 * width, width)
        names[f"{at}.proj_lora"] = (width, width + CONFIG.mlp_hidden)
    path = foreign(tmp_path / "xlabs.safetensors", names, ".down.weight", ".up.weight", None)
    in_diffusers(model, path)
    check(model, transformer, path)
