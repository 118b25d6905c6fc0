"""The rules for tiles, and the table of measured ones."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tile_table, tuning
from pallas_kernels.errors import UserError
from pallas_kernels.mosaic_direct import scratch_types
from pallas_kernels.mosaic_mma import Shape
from pallas_kernels.tile_table import Device, Entry
from pallas_kernels.tiles import (
    AHEAD,
    SHARED,
    SHARED_BYTES,
    DirectTile,
    FewTile,
    Problem,
    Tile,
    TritonTile,
    fit_store,
    low_rank_stages,
    mosaic_rule,
    shared_bytes,
    shared_row,
    triton_rule,
)

H200 = Device(kind="NVIDIA H200", multiprocessors=132)
PROBLEMS = [
    Problem(m=m, n=n, k=k, activation_bits=bits, grouped=grouped)
    for m in (1, 9, 64, 65, 512, 4608, 100_000)
    for n, k in ((3072, 3072), (21504, 3072), (8, 256))
    for bits in (8, 16)
    for grouped in (False, True)
]


def assert_fits(tile, problem):
    assert shared_bytes(tile, problem) <= SHARED_BYTES
    if isinstance(tile, Tile):
        assert tile.tokens % tile.store == 0
        assert tile.tokens % 8 == 0
        assert tile.tokens <= 256
        assert fit_store(tile, jnp.float32) % 8 == 0
        assert tile.planes >= 2 or not problem.grouped


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_rules_give_tiles_that_fit(problem):
    tile = mosaic_rule(problem, 132)
    assert_fits(tile, problem)
    assert isinstance(tile, DirectTile) == (problem.m <= 16 and not problem.grouped)
    assert isinstance(tile, FewTile) == (16 < problem.m <= 64 and not problem.grouped)
    if isinstance(tile, FewTile):
        assert tile.tokens >= problem.m


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_is_tried_fits(problem):
    tried = tuning.candidates("mosaic", problem, H200)
    assert tried[0] == mosaic_rule(problem, 132)
    assert len(set(tried)) == len(tried) > 1
    for tile in tried:
        assert_fits(tile, problem)


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", [4, 40, 128])
def test_what_is_tried_can_be_called(monkeypatch, backend, bits, m):
    """A search goes on past what fails, so that a call that none can take looks like bad tiles."""

    def in_place_of_triton(x, packed, operands, *, out_dtype, tile, gelu):
        return jnp.zeros((x.shape[0], packed.shape[0]), out_dtype)

    monkeypatch.setattr(tuning.triton_matmul, "product", in_place_of_triton)
    problem = Problem(m=m, n=384, k=512, activation_bits=bits)
    first = tuning.arguments(problem)[0]
    for tile in tuning.candidates(backend, problem, H200):
        found = jax.eval_shape(tuning.multiplier(backend, problem, H200, tile), *first)
        assert (found.shape, found.dtype) == ((m, 384), jnp.bfloat16)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", [100, 512, 4096, 4608])
def test_a_low_rank_branch_finds_room_in_the_rules_tiles(bits, m):
    for n, k, grouped in ((3072, 3072, False), (9216, 3072, False), (3072, 15360, True)):
        tile = mosaic_rule(Problem(m=m, n=n, k=k, activation_bits=bits, grouped=grouped), 132)
        assert isinstance(tile, Tile)
        assert low_rank_stages(tile, bits)


def test_a_low_rank_branch_finds_room_in_the_table():
    entries = tile_table.read_entries(tile_table.file_of(H200.kind))
    tiles = [entry for entry in entries if isinstance(entry.tile, Tile)]
    assert tiles
    assert all(low_rank_stages(entry.tile, entry.problem.activation_bits) for entry in tiles)


def test_shared_memory_is_counted():
    many, few = (
        Problem(m=4608, n=3072, k=3072, activation_bits=8),
        Problem(m=16, n=9216, k=3072, activation_bits=16),
    )
    # 4 stages of 128 x 256, 4 of 256 x 64, and 2 x 2 buffers of 32 x 128 16-bit results.
    assert shared_bytes(Tile(), many) == 131_072 + 65_536 + 32_768
    # 8 stages of 16 x 256 16-bit inputs and 64 x 64 codes, three sums of 64 x 16, and the result.
    assert shared_bytes(FewTile(tokens=16), few) == 8 * (8192 + 4096) + 3 * 4096 + 2048
    # Of 8 warps, 2 stages of 64 x 64 codes, and sums of 64 x 16.
    assert shared_bytes(DirectTile(groups=2, rows=64), few) == 8 * (2 * 4096 + 4096)
    # Two warps share 64 outputs: half the codes for each, and half as many sums.
    assert shared_bytes(DirectTile(groups=2, rows=32), few) == 8 * 2 * 2048 + 4 * 4096


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("activations", [AHEAD, SHARED])
@pytest.mark.parametrize("tokens", [1, 9])
def test_shared_memory_of_the_fewest_rows_is_what_is_asked_for(tokens, activations, bits):
    tile = DirectTile(groups=3, rows=48, outputs=144, stages=2, activations=activations)
    shape = Shape(
        tokens=tokens,
        outputs=9216,
        tile=144,
        blocks=5,
        warps=12,
        rows=48,
        stages=2,
        activations=activations,
        exact=bits == 8,
    )
    asked = [np.empty(each.shape, each.dtype).nbytes for each in scratch_types(shape)]
    if activations != SHARED:
        # Pallas has no empty arrays.
        asked[-1] = 0
    assert sum(asked) == shared_bytes(tile, Problem(m=tokens, n=9216, k=1040, activation_bits=bits))


def test_rows_that_are_read_together_come_from_different_banks():
    """Of eight lanes, two tokens' quarters of a warp: 16 bytes each, which fill the 32 banks."""
    for size in (1, 2):
        stride = shared_row(3072, size)
        starts = [token * stride + 16 * size * quarter for token in (0, 1) for quarter in range(4)]
        assert sorted(start % 128 // 16 for start in starts) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 24}, "cannot share out"),
        ({"rows": 48, "outputs": 80, "groups": 2}, "cannot share out"),
        ({"rows": 64, "outputs": 192, "groups": 2}, "cannot share out"),
        ({"rows": 32, "outputs": 128}, "a warpgroup for each 64"),
        ({"rows": 32, "outputs": 32}, "64 outputs or more"),
    ],
)
def test_a_tile_that_cannot_be_shared_out_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        DirectTile(**sizes)


def test_a_tile_that_writes_what_is_being_read_is_refused():
    """`python -m tools.hazards` found it in the machine code, after a GPU had shown wrong sums."""
    for fine in ({"planes": 1}, {"planes": 2}, {"flight": 3}, {"planes": 2, "flight": 1}):
        assert Tile(lag=1, **fine).lag == 1
    for wrong in ({}, {"flight": 4}, {"rows": 64}):
        with pytest.raises(ValueError, match="expected 1 or 2 planes, or flight of 3 or less"):
            Tile(lag=1, **wrong)


def test_fewer_tokens_are_cut_into_more_tiles():
    """512 tokens of the largest tile would leave most multiprocessors without work."""
    tile = mosaic_rule(Problem(m=512, n=3072, k=3072, activation_bits=8), 132)
    assert tile.rows * tile.tokens < 128 * 128


def test_a_tile_goes_evenly_into_the_tokens_of_a_gate():
    """Two images' 512 tokens of text: 96 would leave gate and residual to another pass."""
    problem = Problem(m=1024, n=3072, k=3072, activation_bits=8)
    assert tile_table.mosaic_tile(problem, H200) == tile_table.mosaic_tile(problem, H200, run=1152)
    assert 512 % tile_table.mosaic_tile(problem, H200).tokens
    for run in (512, 1152, 1024):
        tile = tile_table.mosaic_tile(problem, H200, run=run)
        assert isinstance(tile, Tile)
        assert run % tile.tokens == 0
    # Where none does, the one that is chosen for no gates.
    assert mosaic_rule(problem, 132, run=7) == mosaic_rule(problem, 132)


def test_the_table_comes_before_the_rules():
    entries = tile_table.read_entries(tile_table.file_of("NVIDIA H200"))
    mosaic = [entry for entry in entries if entry.backend == "mosaic"]
    assert mosaic
    for entry in mosaic:
        assert tile_table.mosaic_tile(entry.problem, H200) == entry.tile
        assert_fits(entry.tile, entry.problem)
    problem = mosaic[0].problem
    elsewhere = Device(kind="another GPU", multiprocessors=132)
    assert tile_table.mosaic_tile(problem, elsewhere) == mosaic_rule(problem, 132)


def test_triton_without_an_entry():
    problem = Problem(m=4608, n=8, k=256, activation_bits=16)
    assert tile_table.triton_tile(problem, H200) == triton_rule(problem)


def test_writing_replaces_and_keeps(tmp_path):
    path = tmp_path / "gpu.json"
    first, second = (
        Problem(m=4608, n=8, k=256, activation_bits=8),
        Problem(m=1, n=8, k=256, activation_bits=16),
    )
    when = {"jax": "0.0.0", "date": "2026-01-31"}
    entries = [
        Entry(backend="mosaic", problem=first, tile=Tile(along_n=True), ms=2.0, **when),
        Entry(backend="mosaic", problem=second, tile=FewTile(tokens=8, groups=2), ms=1.0, **when),
        Entry(backend="triton", problem=first, tile=TritonTile(warps=4), ms=3.0, **when),
    ]
    tile_table.write_entries("a GPU", entries, path)
    faster = Entry(backend="mosaic", problem=first, tile=Tile(band=16), ms=1.5, **when)
    tile_table.write_entries("a GPU", [faster], path)
    assert sorted(tile_table.read_entries(path), key=repr) == sorted(
        [faster, *entries[1:]], key=repr
    )
    data = json.loads(path.read_text())
    assert data["device_kind"] == "a GPU"
    assert data["entries"][1]["tile"] == {"band": 16}


def test_a_table_is_of_one_kind_of_device(tmp_path):
    path = tmp_path / "gpu.json"
    tile_table.write_entries("a GPU", [], path)
    with pytest.raises(UserError, match="has the tiles of 'a GPU', this device is 'another GPU'"):
        tile_table.write_entries("another GPU", [], path)
    assert json.loads(path.read_text())["device_kind"] == "a GPU"


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "got JSONDecodeError"), ("{}", "got KeyError: 'entries'")],
)
def test_what_is_no_table(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"broken.json: expected a table of tiles.*{message}"):
        tile_table.read_entries(path)


def test_an_unknown_field_of_a_tile(tmp_path):
    path = tmp_path / "gpu.json"
    problem = {"m": 1, "n": 1, "k": 1, "activation_bits": 8, "grouped": False}
    entry = {"backend": "mosaic", **problem, "kernel": "many", "tile": {"row": 64}}
    entry |= {"ms": 1.0, "jax": "0", "date": "2026-01-31"}
    path.write_text(json.dumps({"entries": [entry]}))
    with pytest.raises(UserError, match="unexpected keyword argument 'row'"):
        tile_table.read_entries(path)


def test_a_table_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    when = {"jax": "0.0.0", "date": "2026-01-31"}
    entry = Entry(backend="triton", problem=PROBLEMS[0], tile=TritonTile(), ms=3.0, **when)
    path = tmp_path / "gpu.json"
    tile_table.write_entries("a GPU", [entry], path)
    before = path.read_text()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tile_table.os, "replace", full)
    with pytest.raises(UserError, match="gpu.json: cannot be written: No space left on device"):
        tile_table.write_entries("a GPU", [entry, entry], path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stopped_write_leaves_nothing(tmp_path, monkeypatch, stop):
    def stopped(*arguments):
        raise stop

    monkeypatch.setattr(tile_table.os, "replace", stopped)
    with pytest.raises(stop):
        tile_table.write_entries("a GPU", [], tmp_path / "gpu.json")
    assert list(tmp_path.iterdir()) == []


def test_a_table_behind_a_link_is_written_where_it_is(tmp_path):
    (tmp_path / "kept").mkdir()
    table, link = tmp_path / "kept" / "gpu.json", tmp_path / "link.json"
    link.symlink_to(table)
    tile_table.write_entries("a GPU", [], link)
    assert link.is_symlink()
    assert tile_table.read_entries(table) == []
    other = tmp_path / "other"
    other.touch()
    # As readable as any file.
    assert stat.S_IMODE(table.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


WRITER = """
import sys
from pathlib import Path
from pallas_kernels import tile_table
from pallas_kernels.tiles import Problem, TritonTile

print("ready", flush=True)
sys.stdin.readline()
for n in range(100):
    entry = tile_table.Entry(
        backend="triton",
        problem=Problem(m=int(sys.argv[1]), n=n, k=256, activation_bits=8),
        tile=TritonTile(),
        ms=1.0,
        jax="0",
        date="2026-01-31",
    )
    tile_table.write_entries("a GPU", [entry], Path(sys.argv[2]))
"""


def test_two_processes_write_one_table(tmp_path):
    path = tmp_path / "gpu.json"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(m), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for m in (1, 2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        said = [writer.communicate(timeout=120)[1] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0], said
    found = {(entry.problem.m, entry.problem.n) for entry in tile_table.read_entries(path)}
    assert found == {(m, n) for m in (1, 2) for n in range(100)}
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]


def test_the_fastest_trial_is_kept():
    problem = Problem(m=1, n=8, k=256, activation_bits=8)
    trials = [
        tuning.Trial(tile=FewTile(tokens=8), ms=2.0),
        tuning.Trial(tile=FewTile(tokens=8, groups=2), ms=1.0),
        tuning.Trial(tile=FewTile(tokens=8, groups=1), ms=None, failure="too large"),
    ]
    assert tuning.fastest("mosaic", problem, trials).tile.groups == 2
    assert tuning.fastest("mosaic", problem, trials[2:]) is None


def test_a_tile_that_cannot_run_does_not_stop_the_search(monkeypatch):
    problem = Problem(m=4, n=8, k=256, activation_bits=8)

    def multiplier(backend, problem, device, tile):
        def run(x, packed, scale, bias, token_scale, row_sum):
            if tile.stages == 3:
                raise RuntimeError("beyond shared memory")
            return x

        return run

    monkeypatch.setattr(tuning, "multiplier", multiplier)
    trials = list(tuning.search("mosaic", problem, H200, repeats=1))
    failed = [trial for trial in trials if trial.ms is None]
    assert {trial.tile.stages for trial in failed} == {3}
    assert failed[0].failure == "RuntimeError: beyond shared memory"
    assert len(trials) > len(failed)


@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_timed_has_the_sums_of_int8_activations(monkeypatch, bits):
    """Without them the kernel would decode signs, whatever the tile says."""

    def seen(x, packed, operands, **named):
        return operands, named["tile"]

    monkeypatch.setattr(tuning.mosaic, "ternary_matmul", seen)
    problem = Problem(m=70, n=8, k=256, activation_bits=bits)
    arrays = tuning.arguments(problem)[0]
    operands, tile = tuning.multiplier("mosaic", problem, H200, Tile())(*arrays)
    assert tile == Tile()
    if bits == 16:
        assert operands.row_sum is None
    else:
        np.testing.assert_array_equal(operands.row_sum, np.asarray(arrays[0], np.int32).sum(-1))
