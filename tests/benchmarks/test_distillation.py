"""The benchmark of the distillation's choices: its rows, and how its runs are joined."""

import re

import pytest

from benchmarks import distillation
from benchmarks.common import Figure, Result
from benchmarks.distillation_rows import ROWS
from flux_jax.errors import UserError


def write(folder, figures):
    made = {name: Figure(value=value, unit="x") for name, value in figures.items()}
    return Result(benchmark="distillation", device="x", figures=made).write(folder)


def test_runs_of_other_rows_are_joined_in_the_order_of_the_rows(tmp_path):
    first, *_, last = ROWS
    shared = {"steps": 4.0, "teacher/score": 0.5}
    paths = [
        write(tmp_path / "1", {f"{last}, seed 1/score": 0.7, f"{last}/score": 0.8, **shared}),
        write(tmp_path / "2", {f"{first}/score": 0.25, **shared}),
    ]
    found = distillation.combine(paths).figures
    assert {name: figure.value for name, figure in found.items()} == {
        **shared,
        f"{first}/score": 0.25,
        f"{last}/score": 0.8,
        f"{last}, seed 1/score": 0.7,
    }
    order = ["teacher", first, last, f"{last}, seed 1"]
    assert [name.rpartition("/")[0] for name in found if "/" in name] == order


def test_runs_of_other_lengths_are_refused(tmp_path):
    paths = [write(tmp_path / str(steps), {"steps": steps}) for steps in (4.0, 5.0)]
    message = re.escape(f"{paths[0]}: steps is 4.0, not 5.0 as in another")
    with pytest.raises(UserError, match=message):
        distillation.combine(paths)


def test_a_row_differs_from_the_first_in_one_choice():
    plain = ROWS["distilled, per channel"]
    for name, row in ROWS.items():
        if name.startswith("distilled") and row != plain:
            changed = [
                field
                for field in ("quant", "trajectory", "drawn_bits")
                if getattr(row, field) != getattr(plain, field)
            ]
            assert len(changed) == 1, name
    assert len(set(ROWS.values())) == len(ROWS)
