"""Several processes on one machine: they find each other, agree with one, and end together."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flux_jax.errors import UserError
from flux_jax.processes import settings
from tests.jobs import finish, start, with_devices
from tests.small_pipeline import WORDS, small_folder

# With 0, the loss of the second step depends by 2e-5 on the order of its sums, on every mesh alike;
# those of the steps after it do not.
SEED = 1
PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in WORDS[6:10]]
SETTINGS = f"""
seed: {SEED}
distill: {{steps: 6, learning_rate: 2e-3, warmup: 1, compute_dtype: float32}}
policy: {{include: ["single_blocks.*"]}}
trajectory: {{sampling_steps: [3, 4], groups: 2}}
batch_size: 4
held_out: 0
sampling_steps: 1
sample_every: 0
checkpoint_every: 2
log_every: 1
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments that all runs share."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "run.yaml").write_text(SETTINGS)
    (folder / "held_out.txt").write_text("the star")
    teacher = small_folder(folder / "teacher")
    return [
        *(sys.executable, "-m", "ternary", "distill", "--quiet", "--teacher", str(teacher)),
        *("--prompts", str(folder / "prompts.txt"), "--config", str(folder / "run.yaml")),
    ]


def inputs_folder(inputs):
    return Path(inputs[inputs.index("--prompts") + 1]).parent


def losses(out):
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return np.array([float(row["loss"]) for row in rows])


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The run of one process with one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run([*inputs, "--out", str(out)], env=with_devices(1), check=True)
    return out


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(2, 2, "data=2,fsdp=2"), (4, 1, "fsdp=2,tensor=2")]
)
def test_processes_give_the_losses_of_one(inputs, alone, tmp_path, count, devices, mesh):
    out = tmp_path / "run"
    command = [*inputs, "--out", str(out), "--mesh", mesh]
    if count == 2:
        command += ["--held-out", str(inputs_folder(inputs) / "held_out.txt")]
    finish(start(command, count, devices))
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)
    # One process wrote, and all of it.
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert (out / "samples" / "step_000006.png").exists() == (count == 2)
    size = (alone / "student" / "transformer" / "ternary.safetensors").stat().st_size
    assert (out / "student" / "transformer" / "ternary.safetensors").stat().st_size == size


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(inputs, alone, tmp_path, killed):
    out = tmp_path / "run"
    command = [*inputs, "--out", str(out), "--mesh", "fsdp=2"]
    jobs = start(command, 2, 1)
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / "2").exists():
        assert [job.poll() for job in jobs] == [None, None], "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    jobs[killed].send_signal(signal.SIGKILL)
    # The promise to the user is a minute.
    said = jobs[1 - killed].communicate(timeout=60)[1]
    jobs[killed].communicate()
    assert jobs[1 - killed].returncode != 0
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: process {1 - killed} of 2 ended in the middle of its work")
    assert "Traceback" not in said, said
    assert not (out / "student").exists()
    finish(start(command, 2, 1))
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)


PLAIN = {"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}


def test_plain_variables_are_read():
    found = settings(PLAIN)
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == (
        "host:1234",
        4,
        3,
    )
    # Open MPI 5 gives the numbers, and no address.
    numbers = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert settings({"COORDINATOR_ADDRESS": "host:1", **numbers})["process_id"] == 1
    # Without an address, JAX finds out.
    assert settings(numbers) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NUM_PROCESSES": ""}, "COORDINATOR_ADDRESS is set without NUM_PROCESSES"),
        ({"COORDINATOR_ADDRESS": ""}, "NUM_PROCESSES is set without COORDINATOR_ADDRESS"),
        ({"PROCESS_ID": "4"}, r"PROCESS_ID must be below NUM_PROCESSES \(4\), got 4"),
        ({"PROCESS_ID": "one"}, "PROCESS_ID must be a whole number, got 'one'"),
        ({"COORDINATOR_ADDRESS": "host"}, "COORDINATOR_ADDRESS must be HOST:PORT, got 'host'"),
    ],
)
def test_variables_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        settings({**PLAIN, **change})


def test_without_a_cluster_it_says_what_to_do(inputs, tmp_path):
    names = ("COORDINATOR_ADDRESS", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri")
    environment = {n: v for n, v in os.environ.items() if n not in names}
    done = subprocess.run(
        [*inputs, "--out", str(tmp_path / "run"), "--distributed"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot join other processes (")
    assert done.stderr.count("\n") == 1
