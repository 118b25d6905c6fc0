import dataclasses

import pytest

from benchmarks import render_tables
from benchmarks.common import RESULTS, Figure, Peer, Result, read_result

RESULT = Result(
    benchmark="transformer_step",
    device="NVIDIA H200",
    figures={
        "step_ms": Figure(value=118.254, unit="ms"),
        "paper_linears_tflop": Figure(value=59.5, unit="TFLOP"),
    },
    peers={
        "diffusers, eager": Peer(
            versions={"python": "3.12.3", "torch": "2.11.0"},
            figures={
                "step_ms": Figure(value=171.5, unit="ms"),
                "first_step_s": Figure(value=2.0, unit="s"),
            },
        )
    },
    date="2026-01-31",
    command="python -m benchmarks.transformer_step --peers",
    hardware={"driver": "580.1"},
    versions={"jax": "0.11.2"},
    commit="0123456789" * 4,
)


@pytest.mark.parametrize("path", render_tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert render_tables.render_document(path) == text, "run python -m benchmarks.render_tables"


def test_every_committed_result_is_shown():
    shown = "".join(path.read_text(encoding="utf-8") for path in render_tables.DOCUMENTS)
    for path in RESULTS.glob("*.json"):
        assert f"<!-- results: {read_result(path).benchmark} -->" in shown, path.name


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_committed_results_follow_the_schema(path):
    assert read_result(path).file_name == path.name


def test_table_has_a_column_for_each_peer():
    lines = render_tables.render_result(RESULT).splitlines()
    assert lines[0].endswith("| ours | diffusers, eager |")
    assert lines[2] == "| time per step, steps queued | 118.3 ms | 171.5 ms |"
    assert lines[3] == "| first step, compilation included |  | 2.00 s |"
    assert lines[-1] == (
        "Measured on NVIDIA H200 (driver 580.1), JAX 0.11.2, torch 2.11.0, 2026-01-31, "
        "commit 0123456, `python -m benchmarks.transformer_step --peers`."
    )
    assert "TFLOP" not in "".join(lines)


def test_every_commit_of_a_joined_result_is_named_once():
    first, second = 40 * "a", 40 * "b"
    call = "python -m benchmarks.made --only 'a and b'"
    command = f"{call} --commit {first} --out o and {call} --commit '{second} with changes'"
    result = dataclasses.replace(RESULT, command=command, commit=first)
    line = render_tables.render_result(result).splitlines()[-1]
    assert line.endswith(f", commits aaaaaaa, bbbbbbb with changes, `{call}`.")


def test_blocks_are_rewritten_and_nothing_else(tmp_path):
    RESULT.write(tmp_path)
    text = "before\n<!-- results: transformer_step -->\nold\n<!-- /results -->\nafter\n"
    rendered = render_tables.render(text, tmp_path)
    assert rendered.startswith("before\n<!-- results: transformer_step -->\n| FLUX.1-dev")
    assert rendered.endswith("transformer_step --peers`.\n<!-- /results -->\nafter\n")
    assert "old" not in rendered
    assert render_tables.render(rendered, tmp_path) == rendered


def test_another_benchmark_with_the_same_beginning_is_left_out(tmp_path):
    Result(
        benchmark="transformer_step_tiny",
        device="NVIDIA H200",
        figures={"step_ms": Figure(value=1.0, unit="ms")},
    ).write(tmp_path)
    assert render_tables.render_benchmark("transformer_step", tmp_path) == "Not measured yet."


def test_a_benchmark_without_a_layout_shows_every_figure(tmp_path):
    Result(
        benchmark="other",
        device="cpu",
        figures={"peak_bytes": Figure(value=12345, unit="count")},
    ).write(tmp_path)
    assert "| peak bytes | 12,345 |" in render_tables.render_benchmark("other", tmp_path)


def test_variants_stand_beside_their_limit():
    figures = {
        "a8_speedup": Figure(value=1.8, unit="x"),
        "triton_a8_speedup": Figure(value=1.1, unit="x"),
        "few_a16_speedup": Figure(value=2.5, unit="x"),
        "quantize_ms/1x2x3": Figure(value=1.0, unit="ms"),
    }
    result = dataclasses.replace(RESULT, benchmark="ternary_kernels", figures=figures)
    lines = render_tables.render_result(result).splitlines()
    assert lines[0].endswith("| limit | target | Mosaic | Triton |")
    ends = [line.partition("tokens")[2] for line in lines[2:4]]
    # What was not measured has no row, or an empty cell.
    assert ends == [" | 2.0 x | 1.75 x | 1.80 x | 1.10 x |", " | 8 x | 4 x | 2.50 x |  |"]
    assert not lines[4]


def test_figures_of_rows_and_measures_become_a_matrix(tmp_path):
    figures = {
        "one way/score": Figure(value=0.5, unit="share"),
        "one way/median_psnr": Figure(value=22.25, unit="dB"),
        "another/score": Figure(value=0.25, unit="share"),
        "steps": Figure(value=3, unit="count"),
    }
    Result(benchmark="distillation", device="cpu", figures=figures).write(tmp_path)
    lines = render_tables.render_benchmark("distillation", tmp_path).splitlines()
    assert lines[0].startswith("| student | composition score | kept of the teacher's | median")
    assert lines[2] == "| one way | 0.500 |  | 22.2 dB |  |  |  |"
    assert lines[3] == "| another | 0.250 |  |  |  |  |  |"
    assert lines[4] == ""
