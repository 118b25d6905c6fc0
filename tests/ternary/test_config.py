"""Settings: every one that no training could use is refused in one line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from flux_jax.errors import UserError
from ternary.config import CalibrateConfig, DistillConfig, QuantConfig, TrajectoryConfig
from ternary.distillation.run_config import RunConfig, load_yaml, read_run_config, to_yaml

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "row"}, "granularity must be one of tensor, channel, group128, got 'row'"),
        ({"activation_bits": 4}, "activation_bits must be 8 or 16, got 4"),
        ({"rank": -1}, "rank must be a whole number of at least 0, got -1"),
        ({"refit_steps": True}, "refit_steps must be a whole number of at least 0, got True"),
        ({"activation_bits": 8.0}, "activation_bits must be a whole number of at least 1, got 8.0"),
        ({"learned_scale": "no"}, "learned_scale must be True or False, got 'no'"),
    ],
)
def test_quantisation(any_types, fields, message):
    with pytest.raises(UserError, match=message):
        QuantConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling_steps": ()}, "sampling_steps must have at least one number of steps"),
        ({"sampling_steps": 20}, r"sampling_steps must be a tuple .*, as \(20, 28\), got 20"),
        ({"guidance": 3.5}, r"guidance must be a range \(low, high\), got 3.5"),
        ({"sampling_steps": (20, 0)}, "sampling_steps must be a whole number of .*, got 0"),
        ({"on_policy": 1.5}, r"on_policy must be in \[0, 1\], got 1.5"),
        ({"on_policy": NAN}, "on_policy must be a finite number of at least 0, got nan"),
        ({"guidance": (3.0, 1.0)}, r"guidance must be a range \(low, high\)"),
        ({"guidance": (1.0, NAN)}, "guidance must be a finite number of at least 0, got nan"),
        ({"groups": 0}, "groups must be a whole number of at least 1, got 0"),
    ],
)
def test_trajectories(any_types, fields, message):
    with pytest.raises(UserError, match=message):
        TrajectoryConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adafactor, lion, got 'sgd'"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of float32, bfloat16"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1, got 0"),
        ({"warmup": -5}, "warmup must be a whole number of at least 0, got -5"),
        ({"learning_rate": -1e-3}, "learning_rate must be a finite number of at least 0"),
        ({"learning_rate": NAN}, "learning_rate must be a finite number of at least 0, got nan"),
        ({"block_loss": INF}, "block_loss must be a finite number of at least 0, got inf"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
        ({"max_grad_norm": NAN}, "max_grad_norm must be above 0, got nan"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be above 0, got '1'"),
        ({"remat": 1}, "remat must be True or False, got 1"),
        ({"ema": 1.0}, "ema must be below 1, got 1"),
    ],
)
def test_training(any_types, fields, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**fields)


def test_no_clipping():
    assert DistillConfig(max_grad_norm=INF).max_grad_norm == INF


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"states_each": 30}, r"states_each must be at most sampling_steps \(20\), got 30"),
        ({"accumulate": 3}, r"accumulate must divide batch_size \(8\), got 3"),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1, got 0"),
        ({"guidance": (3.0, 1.0)}, "guidance must be a range"),
        ({"blocks": -1}, "blocks must be a number of at least 0, or names"),
        (
            {"blocks": "double_blocks.0"},
            r"or names, as \('double_blocks.0',\), .*'double_blocks.0'",
        ),
        ({"blocks": True}, "blocks must be a number of at least 0, or names.*, got True"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"master_dtype": "float16"}, "master_dtype must be one of float32, bfloat16"),
    ],
)
def test_calibration(any_types, fields, message):
    with pytest.raises(UserError, match=message):
        CalibrateConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant": {"rank": 2}}, "quant must be a QuantConfig, got {'rank': 2}"),
        ({"policy": ("*",)}, r"policy must be a Policy, got \('\*',\)"),
        ({"trajectory": None}, "trajectory must be a TrajectoryConfig, got None"),
        ({"distill": None}, "distill must be a DistillConfig, got None"),
        ({"mesh": "fsdp=2"}, "mesh must be a MeshConfig, got 'fsdp=2'"),
        ({"height": "128"}, "height must be a whole number of at least 1, got '128'"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number of at least 1"),
        ({"held_out": None}, "held_out must be a whole number of at least 0, got None"),
    ],
)
def test_parts_of_a_run(any_types, fields, message):
    with pytest.raises(UserError, match=message):
        RunConfig(**fields)


def test_lists_and_numbers_of_numpy_are_kept_as_plain_values(any_types):
    trajectory = TrajectoryConfig(sampling_steps=[4, np.int64(8)], guidance=[1, np.float32(2)])
    assert trajectory == TrajectoryConfig(sampling_steps=(4, 8), guidance=(1.0, 2.0))
    assert hash(trajectory)
    assert CalibrateConfig(blocks=["double_blocks.0"]).blocks == ("double_blocks.0",)
    numbers = {
        "steps": np.int64(9),
        "learning_rate": np.float64(0.5),
        "weight_decay": np.float32(0.25),
        "max_grad_norm": np.float32(2),
    }
    distill = DistillConfig(**numbers)
    settings = to_yaml(RunConfig(trajectory=trajectory, distill=distill, seed=np.int32(3)))
    assert load_yaml(settings)["distill"]["steps"] == 9
    # What a calibration has finished, JSON remembers.
    calibrate = json.loads(json.dumps(dataclasses.asdict(CalibrateConfig(**numbers))))
    assert numbers.items() <= calibrate.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The pool of trajectories keeps the seed as int32, where a larger one would wrap.
        ("seed=2147483648", r"seed must be below 2\*\*31, got 2147483648"),
        ("sample_batch_size=0", "sample_batch_size must be a whole number of at least 1, got 0"),
        ("sampling_steps=0", "sampling_steps must be a whole number of at least 1, got 0"),
        ("guidance_scale=-1", "guidance_scale must be a finite number of at least 0, got -1"),
        ("trajectory.guidance=[1, high]", "'trajectory.guidance' must be like 1.0, got 'high'"),
        ("trajectory.guidance=3.5", "'trajectory.guidance' must be like .*, got 3.5"),
        ("trajectory.sampling_steps=[20.5]", "'trajectory.sampling_steps' must be like 20, got 20"),
        ("policy.include=[1]", "'policy.include' must be like 'double_blocks.*', got 1"),
        ("policy.exclude=[1]", "'policy.exclude' must be like '', got 1"),
        ("height=true", "'height' must be a whole number, got True"),
        ("trajectory.on_policy=yes", "'trajectory.on_policy' must be like 0.3, got True"),
    ],
)
def test_a_run(change, message):
    with pytest.raises(UserError, match=message):
        read_run_config(None, [change])


def test_numbers_may_be_written_with_an_exponent():
    changes = ["distill.learning_rate=1e-3", "trajectory.guidance=[1e0, 5e0]"]
    config = read_run_config(None, changes)
    assert config.distill.learning_rate == 1e-3
    assert config.trajectory.guidance == (1.0, 5.0)


def test_yaml_has_the_task_in_front_and_the_settings_in_order():
    lines = to_yaml(RunConfig(), teacher="tiny", prompts="p.txt").splitlines()
    assert lines[:3] == ["teacher: tiny", "prompts: p.txt", "quant:"]
    assert lines[-1] == "checkpoints: 2"
