"""The kernels on a GPU: `pytest -m gpu tests/pallas_kernels`.

The Mosaic kernels need Hopper, the Triton kernel any NVIDIA GPU from Ampere on, with jax-triton.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import (
    Columns,
    group_count,
    mosaic,
    normalize_and_quantize,
    pack_codes,
    quantize_activations,
    quantize_columns,
    ternary_matmul,
    tile_table,
)
from pallas_kernels.backends import describe, device_of, why_not
from pallas_kernels.checking import CASES, Case, arguments, check, make, public_op
from pallas_kernels.tiles import (
    CODE,
    INT8_TILES,
    LATE,
    SHARED,
    SHARED_BYTES,
    SIGN,
    TOP,
    DirectTile,
    FewTile,
    Problem,
    Tile,
    shared_bytes,
)

pytestmark = pytest.mark.gpu

TILES = [
    Tile(),
    Tile(decode=SIGN),
    Tile(decode=TOP),
    Tile(along_n=True, band=16),
    Tile(lag=1, flight=3),
    Tile(planes=2, stages=8, lag=1),
    Tile(rows=64, tokens=256, planes=2, stages=4, lag=1),
    *(tile for tile, _ in INT8_TILES[1:]),
]
TILES_16 = [
    Tile(planes=2),
    Tile(planes=1, stages=8),
    Tile(rows=64, tokens=256, planes=1, stages=5),
    Tile(rows=64, tokens=192, planes=1, stages=6, lag=1),
]


@pytest.fixture(params=["mosaic", "triton"])
def backend(request):
    reason = why_not(request.param, device_of(None), jnp.bfloat16, jnp.bfloat16, 16)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def hopper():
    reason = why_not("mosaic", device_of(None), jnp.bfloat16, jnp.bfloat16, 16)
    if reason:
        pytest.skip(f"mosaic: {reason}")
    return describe(device_of(None))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_the_roundings(backend, case):
    outcome = check(case, backend, public_op(backend), seed=3)
    assert outcome.passed, outcome


def with_tile(tile, device):
    def multiply(case, **arrays):
        return mosaic.ternary_matmul(
            *arguments(arrays),
            activation_bits=case.activation_bits,
            out_dtype=case.out_dtype,
            gelu=case.gelu,
            device=device,
            tile=tile,
        )

    return multiply


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_sums_int8_exactly(hopper, tile):
    case = Case(m=300, n=1032, k=1040, integers=True, out_dtype="float32")
    outcome = check(case, "mosaic", with_tile(tile, hopper))
    assert outcome.passed, outcome


@pytest.mark.parametrize("tile", TILES_16, ids=str)
def test_every_tile_of_16_bit_activations(hopper, tile):
    case = Case(m=300, n=1032, k=1040, activation_bits=16, extras=True)
    outcome = check(case, "mosaic", with_tile(tile, hopper))
    assert outcome.passed, outcome


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_every_tile_of_few_rows(hopper, tokens, bits):
    for groups, stages in ((4, 2), (2, 3), (1, 4)):
        tile = FewTile(tokens=tokens, groups=groups, stages=stages)
        if (
            shared_bytes(tile, Problem(m=tokens, n=264, k=1040, activation_bits=bits))
            > SHARED_BYTES
        ):
            continue
        case = Case(m=tokens - 1, n=264, k=1040, activation_bits=bits)
        outcome = check(case, "mosaic", with_tile(tile, hopper))
        assert outcome.passed, (tile, outcome)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16])
def test_every_tile_of_fewest_rows(hopper, tokens, bits):
    tiles = (
        DirectTile(rows=64, stages=1, activations=LATE),
        DirectTile(rows=32, stages=3, activations=SHARED),
        DirectTile(groups=2, rows=16, activations=LATE),
        DirectTile(groups=3, rows=64, stages=1),
        DirectTile(groups=3, rows=48, outputs=144, activations=SHARED),
        DirectTile(groups=3, rows=80, outputs=80, stages=1, activations=SHARED),
    )
    for tile in tiles:
        for n, k in ((264, 1040), (1, 256), (130, 4096)):
            if shared_bytes(tile, Problem(m=tokens, n=n, k=k, activation_bits=bits)) > SHARED_BYTES:
                continue
            case = Case(m=tokens, n=n, k=k, activation_bits=bits, extras=True)
            outcome = check(case, "mosaic", with_tile(tile, hopper))
            assert outcome.passed, (tile, outcome)


@pytest.mark.parametrize("tokens", [3, 16])
def test_sums_of_fewest_rows_are_exact(hopper, tokens):
    tiles = (
        DirectTile(rows=64),
        DirectTile(groups=3, rows=16),
        DirectTile(groups=3, rows=48, outputs=144, activations=SHARED),
    )
    for tile in tiles:
        case = Case(m=tokens, n=200, k=3072, integers=True, out_dtype="float32", row_sum=False)
        outcome = check(case, "mosaic", with_tile(tile, hopper))
        assert outcome.passed, outcome


def test_every_tile_of_the_table_runs(hopper):
    path = tile_table.file_of(hopper.kind)
    if not path.exists():
        pytest.skip(f"no table for {hopper.kind}")
    for entry in tile_table.read_entries(path):
        if entry.backend != "mosaic":
            continue
        problem = entry.problem
        granularity = "group" if problem.grouped else "channel"
        size = {"m": min(problem.m, 200), "n": 520, "k": 768}
        bits = problem.activation_bits
        # Of two times 64 columns, where the tile has its own way with them.
        for rank in (0, 72):
            case = Case(
                **size, activation_bits=bits, granularity=granularity, extras=True, rank=rank
            )
            outcome = check(case, "mosaic", with_tile(entry.tile, hopper))
            assert outcome.passed, (entry, outcome)


@pytest.mark.parametrize(
    ("tile", "bits"), [*((tile, 8) for tile in TILES), *((tile, 16) for tile in TILES_16)], ids=str
)
def test_a_low_rank_branch_in_every_tile(hopper, tile, bits):
    """Several tiles a block of threads: the stages go on from one to the next."""
    case = Case(m=2500, n=4000, k=512, activation_bits=bits, rank=136)
    outcome = check(case, "mosaic", with_tile(tile, hopper))
    assert outcome.passed, outcome


def random_case(seed, granularity):
    rng = np.random.default_rng(seed)
    m, n, k = (int(v) for v in (rng.integers(1, 700), rng.integers(1, 900), rng.integers(1, 2500)))
    bits = int(rng.choice([8, 16]))
    return Case(m=m, n=n, k=k, activation_bits=bits, granularity=granularity, out_dtype="float32")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_random_shapes(backend, granularity):
    for seed in range(4):
        outcome = check(random_case(seed, granularity), backend, public_op(backend), seed)
        assert outcome.passed, outcome


@pytest.mark.parametrize("shape", [(300, 3072), (5, 15360), (7, 256), (3, 100)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantised_activations_are_the_same_bits(hopper, shape, dtype):
    """Of rows that are not finite, their scales and sums."""
    x = jax.random.normal(jax.random.key(0), shape, dtype).at[1].set(0).at[2, 5].set(jnp.inf)
    x = x.at[-1, 7].set(jnp.nan)
    q, scale, row_sum = map(np.asarray, quantize_activations(x, backend="mosaic"))
    want_q, want_scale, want_sum = map(np.asarray, quantize_activations(x, backend="jax"))
    finite = np.isfinite(np.asarray(x, np.float32)).all(-1)
    assert np.isfinite(want_scale).tolist() == finite.tolist()
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(q[finite], want_q[finite])
    np.testing.assert_array_equal(row_sum, np.where(finite, want_q.sum(-1, dtype=np.int32), 0))
    np.testing.assert_array_equal(want_sum, row_sum)


@pytest.mark.parametrize("batch", [1, 2])
def test_joined_columns(hopper, batch):
    """What a single block of FLUX joins; off by one only where a value is all but halfway."""
    keys = jax.random.split(jax.random.key(5), 2)
    attended = jax.random.normal(keys[0], (batch, 150, 3072), jnp.bfloat16)
    projected = jax.random.normal(keys[1], (batch, 150, 21504), jnp.bfloat16)
    parts = [Columns(attended, 0, 3072), Columns(projected, 9216, 12288, gelu=True)]
    q, scale, row_sum = quantize_columns(parts, backend="mosaic")
    want = quantize_columns(parts, backend="jax")
    np.testing.assert_allclose(np.asarray(scale), np.asarray(want.scale), rtol=1e-5)
    different = np.asarray(q, np.int32) - np.asarray(want.values)
    assert np.abs(different).max() <= 1
    assert (different != 0).mean() < 1e-3
    np.testing.assert_array_equal(np.asarray(row_sum), np.asarray(q, np.int32).sum(-1))


@pytest.mark.parametrize("k", [3072, 256])
def test_normalised_activations(hopper, k):
    """Off by one only where float64 says that a value is all but halfway."""
    keys = jax.random.split(jax.random.key(2), 3)
    x = 1 + 3 * jax.random.normal(keys[0], (300, k), jnp.bfloat16)
    gain, shift = (jax.random.normal(key, (k,), jnp.bfloat16) for key in keys[1:])
    q, scale, _ = normalize_and_quantize(x, gain, shift, backend="mosaic")
    wide = np.asarray(x, np.float64)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    wide = wide * (1 + np.asarray(gain, np.float64)) + np.asarray(shift, np.float64)
    largest = np.abs(wide).max(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(scale), largest[:, 0] / 127, rtol=1e-5)
    # float32: some 1e-6 of a magnitude of up to 127, and of the sums before it.
    assert np.abs(np.asarray(q) - wide / largest * 127).max() <= 0.5 + 2e-3


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_transforms(backend, bits, granularity):
    rng = np.random.default_rng(4)
    k, n = 512, 264
    packed = pack_codes(jnp.asarray(rng.integers(0, 3, (n, k), np.uint8)))
    shape = (n, group_count(k)) if granularity == "group" else (n,)
    scale = jnp.asarray(rng.uniform(0.01, 0.05, shape), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 70, k)), jnp.bfloat16)

    def op(x, name=backend):
        return ternary_matmul(x, packed, scale, activation_bits=bits, backend=name)

    whole = np.asarray(op(x), np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(jax.vmap(op))(x), np.float32), whole)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    spec = PartitionSpec("data")
    for check_vma in (True, False):
        settings = {"mesh": mesh, "in_specs": spec, "out_specs": spec, "check_vma": check_vma}
        sharded = jax.jit(jax.shard_map(op, **settings))
        np.testing.assert_array_equal(np.asarray(sharded(x), np.float32), whole)

    def loss(x, name):
        return op(x, name).astype(jnp.float32).sum()

    ours, want = (jax.grad(loss)(x, name) for name in (backend, "jax"))
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize(
    ("tile", "bits", "decodings"),
    [(Tile(), 8, (CODE, SIGN, TOP)), (Tile(planes=2), 16, (SIGN, TOP))],
    ids=["int8", "bfloat16"],
)
def test_all_decodings_give_the_same_bits(hopper, tile, bits, decodings):
    """Codes' sums less the activations' are exact, and a power of two rounds nothing."""
    case = Case(m=200, n=520, k=768, activation_bits=bits, out_dtype="float32")
    arrays = make(case)
    del arrays["codes"]
    # Of a row that is not, an element is inf or NaN: which of them, nobody says.
    finite = np.isfinite(np.asarray(arrays["x"], np.float32)).all(-1)
    results = []
    for decode in decodings:
        multiply = with_tile(dataclasses.replace(tile, decode=decode), hopper)
        outcome = check(case, "mosaic", multiply)
        assert outcome.passed, outcome
        results.append(np.asarray(multiply(case, **arrays))[finite].view(np.uint32))
    for decode, result in zip(decodings, results, strict=True):
        np.testing.assert_array_equal(result, results[0], f"{decode} and {decodings[0]}")
