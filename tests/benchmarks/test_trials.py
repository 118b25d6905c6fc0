"""A trial of a benchmark leaves the published result alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import common, composition, distillation, scaling_plan, student
from benchmarks.common import Figure

SHARE = Figure(value=1.0, unit="share")
EVALUATION = SimpleNamespace(scores=SimpleNamespace(overall=SimpleNamespace(passed=1.0)))


class Pipeline:
    transformer = vae = scheduler = text_encoders = None

    def __init__(self, **parts):
        pass

    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def encode_prompt(self, texts):
        return None


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of published results, empty."""
    folder = tmp_path / "results"
    monkeypatch.setattr(common, "RESULTS", folder)
    return folder


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """In place of models, pictures and plans; what a command does around them is real."""
    # Its command sets these.
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")
    plan = {"peak": Figure(value=1.0, unit="GiB")}
    monkeypatch.setattr(scaling_plan, "plan_cpus", lambda name, width: plan)
    for module in (composition, student):
        monkeypatch.setattr(module, "FluxPipeline", Pipeline)
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: EVALUATION)
    monkeypatch.setattr(composition, "figures", lambda scores: {"overall": SHARE})
    monkeypatch.setattr(composition, "check_detector", lambda: (None, None))
    for name, value in {
        "score_figures": {"overall": SHARE},
        "to_flat": {"weight": np.zeros(3)},
        "eight_bit": None,
        "rounded": None,
        "pictures": None,
        "folder_bytes": 6,
        "psnr": np.ones(2),
    }.items():
        monkeypatch.setattr(student, name, lambda *_, value=value: value)
    bench = SimpleNamespace(judged=[], say=print, compile=lambda row: None)
    monkeypatch.setattr(distillation, "Bench", lambda *_, **__: bench)
    runner = SimpleNamespace(run_all=lambda *_, **__: [None], scored=lambda wait: {}, close=list)
    monkeypatch.setattr(distillation, "Runner", lambda *_, **__: runner)


def call(module, folder: Path, **options):
    if module is student:
        options["images"] = folder / "images"
    if module is scaling_plan:
        options["cpu"] = True
    module.main(**options)


@pytest.mark.parametrize(
    ("module", "options", "named"),
    [
        (distillation, {"smoke": True}, "--smoke"),
        (student, {"limit": 1}, "--limit"),
        (student, {"limit": 1, "guidance": 1.0}, "--limit and --guidance"),
        (composition, {"guidance": 1.0}, "--guidance"),
        (scaling_plan, {"width": 256}, "--width"),
        (scaling_plan, {"mesh": ["8 devices, fsdp 8"]}, "--mesh"),
    ],
)
def test_a_trial_leaves_the_published_result_alone(
    results, tmp_path, capsys, module, options, named
):
    call(module, tmp_path, **options)
    assert not results.exists()
    line = f"no result file is written with {named}, unless --out FOLDER is given\n"
    assert line in capsys.readouterr().out
    # Under the name that it always had, where a folder is named.
    call(module, tmp_path, **options, out=tmp_path / "out")
    call(module, tmp_path)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [p.name for p in results.iterdir()]
