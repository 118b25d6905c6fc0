"""The full-size benchmark, on the tiny model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    full_size,
    full_size_parts,
    full_size_plot,
    full_size_worker,
    layouts,
    render_tables,
)
from benchmarks.common import Figure, Peer, Result, read_result
from benchmarks.full_size_worker import KINDS, SIZES
from benchmarks.machine import GIB
from benchmarks.processes import card_environment
from benchmarks.random_models import random_transformer
from flux_jax.configs import AutoencoderConfig, FluxConfig, T5Config
from flux_jax.errors import UserError
from flux_jax.pipeline import FluxPipeline
from tests.jobs import with_devices


def make_result(figures, peers=None, **changes):
    fields = {"benchmark": "full_size", "device": "NVIDIA H200", "commit": "abc"}
    return Result(figures=figures, peers=peers or {}, **{**fields, **changes})


@pytest.mark.long
def test_tiny_run_writes_a_result(tmp_path, monkeypatch):
    """Text to PNG from a checkpoint made by it, and steps; the other parts are alike."""
    # The processes that it starts must not see eight fake devices.
    monkeypatch.setenv("XLA_FLAGS", with_devices(1)["XLA_FLAGS"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    command = [sys.executable, "-m", "benchmarks.full_size", "--tiny"]
    parts = "^(checkpoint|pipeline|card|scaling ternary|loop offloaded)$"
    work = tmp_path / "work"
    subprocess.run(
        [*command, "--only", parts, "--work", str(work), "--out", str(tmp_path)], check=True
    )
    (path,) = tmp_path.glob("*.json")
    result = read_result(path)
    assert result.benchmark == "full_size_tiny"
    figures = {name: figure.value for name, figure in result.figures.items()}
    # Most of the tiny model's bytes are not in its two blocks.
    assert 3 < figures["ratio_disk"] < 6
    assert 0 < figures["first_image_s"] < figures["first_image_cold_s"]
    assert figures["ternary A8, modulation weights on the host/step_ms"] > 0
    name = "ternary A8, {} pixels, batch {}/planned_gib"
    small, large, pair = (figures[name.format(*at)] for at in ((32, 1), (64, 1), (64, 2)))
    assert small < large < pair
    assert (work / "model" / "transformer" / "ternary.safetensors").exists()
    assert list((work / "compiled").iterdir())


def test_full_size_is_flux_dev():
    size = SIZES["full"]
    assert size.transformer == FluxConfig.dev()
    assert size.configs["text_encoder_2"] == T5Config.xxl()
    assert size.configs["vae"] == AutoencoderConfig.flux()
    assert (size.side, size.steps, size.text_tokens) == (1024, 28, 512)
    assert size.grid(1024) == (64, 64)
    assert {512, 768, 1024, 1536, 2048} <= set(size.sides)
    assert {2, 4, 8} <= set(size.batches)


def test_on_paper_text_to_png_needs_less_than_8_gib(monkeypatch):
    """The plan at full size: weights as they are, the work of `paper` and of `decode_bytes`."""
    from benchmarks import paper
    from benchmarks.scaled_weights import ternary_layers
    from flux_jax import images, memory
    from flux_jax.components import abstract_module
    from flux_jax.configs import SchedulerConfig
    from flux_jax.functional import BoundFunction
    from flux_jax.plan import make_plan
    from ternary.config import QuantConfig
    from ternary.storage.checkpoint import abstract_ternary

    configs = SIZES["full"].configs
    config, vae = configs["transformer"], configs["vae"]
    models = {name: abstract_module(name, part) for name, part in configs.items()}
    quant = QuantConfig(activation_bits=8)
    models["transformer"] = abstract_ternary(config, ternary_layers(config), quant, "bfloat16")
    # Compiling it takes minutes on a CPU, and would tell of the CPU.
    step = paper.Step()
    work = max(
        sum(paper.activation_bytes(config, step).values()), images.decode_bytes(vae, 1024**2)
    )
    monkeypatch.setattr(BoundFunction, "work_bytes", lambda self, *args: work)
    plan = make_plan(config, vae, SchedulerConfig.dev(), token_limit=512)
    stages = memory.stage_memory(models, plan)
    assert 5 * GIB < max(need.peak for need in stages.values()) < 8 * GIB
    assert stages["encode (T5)"].weights < 0.75 * GIB
    resident = memory.stage_memory(models, plan, text_encoders="resident")
    assert max(need.peak for need in resident.values()) > 14 * GIB


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_like_trained_ones(kind):
    from flux_jax.tree import to_flat

    config, bits = SIZES["tiny"].transformer, KINDS[kind]
    flat = to_flat(random_transformer(config, activation_bits=bits))
    packed = [name for name in flat if name.endswith(".packed")]
    assert bool(packed) == (kind != "bf16")
    for name, value in flat.items():
        array = np.asarray(value)
        if name in packed:
            codes = np.stack([(array >> shift) & 3 for shift in (0, 2, 4, 6)])
            shares = np.bincount(codes.reshape(-1), minlength=4) / codes.size
            np.testing.assert_allclose(shares, [0.25, 0.5, 0.25, 0], atol=0.02)
            scale = np.asarray(flat[name.replace("packed", "scale")], np.float32)
            weight = (codes.astype(np.float32) - 1).std() * scale.mean()
            assert weight == pytest.approx((4 * array.shape[1]) ** -0.5, rel=0.03), name
        elif array.ndim == 2:
            values = array.astype(np.float32)
            assert (values != 0).mean() > 0.99, name
            assert values.std() == pytest.approx(array.shape[1] ** -0.5, rel=0.1), name


def test_the_plan_counts_what_the_loop_holds():
    import jax
    from flax import nnx

    size = SIZES["tiny"]
    resident, offloaded = (
        full_size_worker.Loop(size, "ternary A8", offload=offload) for offload in (False, True)
    )
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(resident.transformer)))
    assert resident.planned_bytes(32, 1) > weights
    assert offloaded.planned_bytes(32, 1) < resident.planned_bytes(32, 1)
    assert resident.planned_bytes(32, 1) < resident.planned_bytes(64, 1)


def test_the_written_pipeline_draws(tmp_path):
    found = full_size_worker.make_source(SIZES["tiny"], tmp_path, "ternary A16")
    pipe = FluxPipeline.from_pretrained(tmp_path / "model", text_encoders="streamed")
    # The tokenizers take prompts as long as FLUX.1's.
    assert pipe.encode_prompt("a red circle", max_sequence_length=512).prompt_embeds.shape[1] == 512
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
    out = pipe("a red circle", seed=0, output_type="np", progress=False, **options)
    assert 0.01 < out.images.std() < 0.5
    parameters = found["bf16_bytes"] / 2
    assert 8 * found["ternary_bytes"] / parameters < 4


# -- figures, tables and plots ---------------------------------------------------------------------

STEP = {
    "ternary A8/step_ms": Figure(value=60.0, unit="ms"),
    "ternary A16/step_ms": Figure(value=120.0, unit="ms"),
    "ternary A8/peak_gib": Figure(value=3.4, unit="GiB"),
    "bf16/peak_gib": Figure(value=22.6, unit="GiB"),
    "floor_ms": Figure(value=50.0, unit="ms"),
}
PEERS = {
    "diffusers, eager": Peer(versions={}, figures={"step_ms": Figure(value=174.0, unit="ms")}),
    "diffusers, compiled blocks": Peer(
        versions={}, figures={"step_ms": Figure(value=132.0, unit="ms")}
    ),
    "diffusers, fp8, compiled blocks": Peer(
        versions={}, figures={"step_ms": Figure(value=99.0, unit="ms")}
    ),
}


def test_ratios():
    found = {name: figure.value for name, figure in full_size.derived(STEP, PEERS).items()}
    assert found == {
        "ratio_peak": pytest.approx(22.6 / 3.4),
        "over_eager": pytest.approx(2.9),
        "over_compiled": pytest.approx(2.2),
        "over_fp8": pytest.approx(1.65),
        "over_floor": pytest.approx(1.2),
        "a16_over_compiled": pytest.approx(1.1),
    }
    assert full_size.derived({}, PEERS) == {}


def test_parts_of_several_runs_are_joined(tmp_path):
    paths = []
    for index, (figures, peers) in enumerate([(STEP, {}), ({}, PEERS)]):
        paths.append(make_result(figures, peers).write(tmp_path / str(index)))
    result = full_size.combine(paths)
    assert result.figures["over_fp8"].value == pytest.approx(1.65)
    assert set(result.peers) == set(PEERS)
    later = dataclasses.replace(
        make_result({"floor_ms": STEP["floor_ms"]}), commit="1234567890abcdef"
    )
    every = [*paths, later.write(tmp_path / "later")]
    with pytest.raises(UserError, match="commit is 1234567890abcdef, not .* as before"):
        full_size.combine(every)
    mixed = full_size.combine(every, mixed=True)
    assert mixed.figures["floor_ms"].note.endswith("at 1234567890ab")
    assert "at " not in mixed.figures["ternary A8/step_ms"].note
    other = make_result(STEP, device="NVIDIA A100").write(tmp_path / "other")
    with pytest.raises(UserError, match="device is NVIDIA A100, not NVIDIA H200 as before"):
        full_size.combine([*paths, other])


def test_the_table_has_the_reach_beside_what_was_found(tmp_path):
    figures = {**STEP, **full_size.derived(STEP, PEERS)}
    figures["card_bf16_runs_out"] = Figure(value=1.0, unit="yes")
    text = render_tables.render_result(make_result(figures, PEERS))
    assert "| one step, over diffusers fp8 row-wise compiled |  | 1.25 x | 1.65 x |" in text
    assert "| 24 GB budget: bf16 runs out of memory | yes | yes | yes |" in text
    assert "| transformer on disk, bf16 over ternary | 7.7 x | 9.3 x | not measured yet |" in text
    assert "| diffusers, fp8, compiled blocks | 99.0 ms |" in text
    assert "| ternary A8 | 60.0 ms | 3.40 GiB |" in text


def test_every_target_of_the_table_is_a_figure_that_a_part_or_a_ratio_makes():
    source = "".join(Path(part.__file__).read_text() for part in (full_size, full_size_parts))
    for name, *_ in layouts.LAYOUTS["full_size"].targets:
        assert f'"{name}"' in source, name


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[notebooks]'")
    figures = {}
    for kind, factor in (("bf16", 2.0), ("ternary A8", 1.0)):
        for side, batch in ((512, 1), (1024, 1), (1024, 2)):
            name = f"{kind}, {side} pixels, batch {batch}"
            work = factor * batch * side
            figures[f"{name}/step_ms"] = Figure(value=work, unit="ms")
            figures[f"{name}/planned_gib"] = Figure(value=work / 100, unit="GiB")
    result = make_result(figures)
    assert full_size_plot.points(result)["step_ms", "bf16"][1024, 2] == pytest.approx(4.096)
    for name in ("a.svg", "b.svg"):
        full_size_plot.draw(result, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(UserError, match="has no part 'scaling', nothing to draw"):
        full_size_plot.points(make_result(STEP))


# -- what cannot be measured -----------------------------------------------------------------------


def test_a_failed_part_is_told_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    def fails(bench):
        raise RuntimeError("no such thing")

    def works(bench):
        bench.add("floor_ms", 1.0, "ms")

    monkeypatch.setattr(full_size, "PARTS", {"a": fails, "b": works})
    with pytest.raises(SystemExit, match="not measured: a"):
        full_size.main(
            tiny=True,
            only=None,
            minutes=None,
            work=None,
            combined=None,
            mixed=False,
            out=tmp_path,
            commit="x",
        )
    assert "a: no such thing" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    assert set(read_result(path).figures) == {"floor_ms"}


@pytest.mark.long
@pytest.mark.parity
def test_peers_write_their_figures(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[parity]'")
    output = tmp_path / "peer.json"
    places = ["--size", "tiny", "--output", str(output)]
    step = ["benchmarks.peers.diffusers_step", "--no-compiled", "--repeats", "1", "--fp8"]
    subprocess.run([sys.executable, "-m", *step, *places], check=True)
    modes = json.loads(output.read_text())["modes"]
    assert list(modes) == ["eager", "fp8, eager"]
    assert all(mode["step_ms"] > 0 for mode in modes.values())
    pipeline = [sys.executable, "-m", "benchmarks.peers.diffusers_pipeline"]
    subprocess.run([*pipeline, *places], check=True)
    assert json.loads(output.read_text())["figures"]["draw_s"] > 0


@pytest.mark.parity
def test_fp8_linear_is_the_linear_to_three_bits():
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    from benchmarks.peers.fp8_linear import Fp8Linear

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    # Rows of very different sizes: a scale for each.
    x[0, 1] *= 1e3
    expected = linear(x).float()
    error = (Fp8Linear(linear)(x).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < error.max() < 0.06


@pytest.mark.gpu
@pytest.mark.slow
def test_in_the_memory_of_a_24_gb_card_bf16_runs_out_and_ternary_draws(tmp_path):
    """The loop at full size, 1024 x 1024, in processes whose memory is capped."""
    settings = card_environment()
    assert settings
    found = {}
    for kind in ("bf16", "ternary A8"):
        output = tmp_path / "figures.json"
        command = [sys.executable, "-m", "benchmarks.full_size_worker", "loop", "--kind", kind]
        environment = {**os.environ, **settings}
        subprocess.run(
            [*command, "--loops", "1", "--output", str(output)], check=True, env=environment
        )
        found[kind] = json.loads(output.read_text())
    assert found["bf16"]["out_of_memory"]
    assert not found["ternary A8"]["out_of_memory"]
    assert found["ternary A8"]["peak_bytes"] < 8 * GIB < found["bf16"]["limit_bytes"]
