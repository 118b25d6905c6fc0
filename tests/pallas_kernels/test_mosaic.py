"""The Mosaic GPU kernels in Pallas' GPU interpret mode, at small tiles.

Interpret mode runs the copies, barriers, products and epilogues of every warpgroup. It does not run
the decoding of codes in registers, which `mosaic_decode` replaces there: see `test_decode`.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic, pack_codes, quantize_activations, reference
from pallas_kernels.checking import SMALL_CASES, Case, arguments, check, interpreted_mosaic
from pallas_kernels.mosaic_api import interpret_params
from pallas_kernels.mosaic_direct import product_direct
from pallas_kernels.mosaic_few import product_few
from pallas_kernels.mosaic_matmul import decodes_to, product
from pallas_kernels.mosaic_quantize import Modulation, quantize_rows
from pallas_kernels.operands import Operands
from pallas_kernels.reference import Columns
from pallas_kernels.tile_table import Device
from pallas_kernels.tiles import CODE, INT8_TILES, SIGN, DirectTile, FewTile, Tile

SMALL = {"rows": 64, "tokens": 32, "store": 32, "stages": 3, "code_stages": 2}
FEW_BLOCKS = {"multiprocessors": 1, "per_multiprocessor": 2}
FLOAT32 = jnp.dtype(jnp.float32)


def integers(m, k, n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (m, k)).astype(np.int8)
    x[0] = 127
    x[m // 2] = 0
    codes = rng.integers(0, 3, (n, k), np.uint8)
    exact = x.astype(np.int64) @ (codes.astype(np.int64) - 1).T
    return jnp.asarray(x), pack_codes(jnp.asarray(codes)), exact.astype(np.float32)


@pytest.mark.parametrize(
    ("tile", "shape"),
    [
        (Tile(**SMALL), (20, 320, 72)),
        (Tile(**SMALL, decode=SIGN), (32, 256, 8)),
        (Tile(**SMALL | {"stages": 4}, planes=2, lag=1), (32, 512, 8)),
        (Tile(**SMALL, flight=1, band=1), (33, 256, 8)),
        (Tile(**SMALL, along_n=True, band=1), (20, 256, 136)),
    ],
    ids=["codes", "signs", "lag", "flight", "along_n"],
)
def test_sums_of_int8_are_exact(tile, shape):
    x, packed, exact = integers(*shape)
    wants_sum = decodes_to(tile, x.dtype, False) == CODE
    operands = Operands(
        scale=jnp.ones(shape[2], jnp.float32),
        row_sum=x.astype(jnp.int32).sum(-1) if wants_sum else None,
    )
    # Two blocks in one case only: interpret mode compiles the kernel for every warpgroup.
    settings = {"multiprocessors": 2 if tile.flight else 1, "interpret": interpret_params()}
    y = product(x, packed, operands, out_dtype=FLOAT32, tile=tile, **settings)
    np.testing.assert_array_equal(np.asarray(y), exact)


@pytest.mark.parametrize("shape", [(1, 768, 72), (9, 256, 64), (20, 512, 8)])
def test_sums_of_a_few_rows_are_exact(shape):
    x, packed, exact = integers(*shape)
    operands = Operands(scale=jnp.ones(shape[2], jnp.float32))
    tile = FewTile(tokens=16, groups=2)
    settings = {"tile": tile, "interpret": interpret_params()}
    y = product_few(x, packed, operands, out_dtype=FLOAT32, **settings)
    np.testing.assert_array_equal(np.asarray(y), exact)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 768, 72), {"rows": 64}),
        ((9, 256, 64), {"rows": 32}),
        ((16, 1280, 8), {"groups": 2, "rows": 64}),
        ((3, 1000, 64), {"rows": 16}),
        # The second tile has outputs of the first as well; the second warpgroup, of its own first.
        ((9, 1536, 200), {"groups": 3, "rows": 48, "outputs": 144}),
        ((2, 768, 81), {"groups": 2, "rows": 80, "outputs": 80}),
    ],
    ids=str,
)
def test_sums_of_fewest_rows_are_exact(shape, tile):
    x, packed, exact = integers(*shape)
    operands = Operands(scale=jnp.ones(shape[2], jnp.float32))
    settings = {"tile": DirectTile(**tile), "interpret": interpret_params()}
    y = product_direct(x, packed, operands, out_dtype=FLOAT32, **settings)
    np.testing.assert_array_equal(np.asarray(y), exact)


@pytest.mark.parametrize(
    "case",
    [
        *SMALL_CASES[2:],
        Case(m=9, n=72, k=256, activation_bits=16, out_dtype="float32"),
        Case(m=9, n=8, k=256, activation_bits=16, granularity="group", out_dtype="float32"),
        Case(m=6, n=8, k=256, granularity="tensor", codes="2"),
    ],
    ids=str,
)
def test_the_backend_is_as_exact_as_its_roundings(case):
    """Rows of zeros, inf and NaN and saturated ones are among the activations."""
    outcome = check(case, "mosaic", interpreted_mosaic(), runs=1)
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("bits", "tile"),
    [
        # The outputs' columns in two stages, and products that overlap.
        (8, {"rows": 64, "planes": 2, "stages": 3, "lag": 1}),
        (16, {"rows": 64, "planes": 1, "stages": 4, "lag": 1}),
        # No room for three stages: XLA multiplies.
        (8, {"rows": 64, "planes": 2, "stages": 2}),
    ],
)
@pytest.mark.parametrize("k", [256, 600])
def test_stages_of_a_low_rank_branch(bits, tile, k):
    """Several tiles a block of threads, two times 64 columns each."""
    tile = Tile(**tile, tokens=64, store=32, code_stages=2)
    check_with_tile(Case(m=140, n=136, k=k, activation_bits=bits, rank=72, extras=True), tile)


@pytest.mark.parametrize("tile", INT8_TILES[2:4], ids=str)
def test_tiles_of_fewer_tokens(tile):
    """Those that are written in pieces of 16 tokens, or overlap; the outputs in two stages."""
    tile, _ = tile
    check_with_tile(Case(m=tile.tokens + 5, n=264, k=320, rank=64, extras=True), tile)
    sums = Case(m=tile.tokens + 5, n=264, k=512, integers=True, out_dtype="float32")
    check_with_tile(sums, tile)


def check_with_tile(case, tile):
    def multiply(case, **arrays):
        return mosaic.ternary_matmul(
            *arguments(arrays),
            activation_bits=case.activation_bits,
            out_dtype=case.out_dtype,
            device=Device(kind="interpreted", multiprocessors=2),
            interpret=interpret_params(),
            tile=tile,
        )

    with warnings.catch_warnings():
        # Rows of inf and NaN, for NumPy, which multiplies in the place of the tensor cores.
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
        outcome = check(case, "mosaic", multiply, runs=1)
    assert outcome.passed, outcome


def test_results_repeat():
    case = Case(m=5, n=40, k=320, activation_bits=16)
    outcome = check(case, "mosaic", interpreted_mosaic(), runs=2)
    assert outcome.passed, outcome


def test_activations_that_are_quantised_already():
    """The same bits as quantising inside of the op."""
    x, packed, _ = integers(4, 256, 8)
    x = x.astype(jnp.bfloat16) * 0.37
    settings = {
        "activation_bits": 8,
        "out_dtype": FLOAT32,
        "device": Device(kind="interpreted", multiprocessors=1),
        "interpret": interpret_params(),
    }
    operands = Operands(jnp.float32(0.1))
    whole = mosaic.ternary_matmul(x, packed, operands, **settings)
    q, token_scale, _ = quantize_activations(x)
    operands = operands._replace(token_scale=token_scale)
    parts = mosaic.ternary_matmul(q, packed, operands, **settings)
    np.testing.assert_array_equal(np.asarray(parts), np.asarray(whole))


def test_quantised_rows_are_those_of_plain_jax():
    x = jax.random.normal(jax.random.key(0), (8, 512), jnp.bfloat16)
    x = x.at[2].set(0).at[3, 5].set(jnp.inf).at[4].set(1e-40).at[5, 0].set(jnp.nan)
    # 127 over it is a float32, but only just.
    x = x.at[7].set(2.0**-121)
    q, scale, row_sum = quantize_rows(
        [Columns(x, 0, x.shape[1])], **FEW_BLOCKS, interpret=interpret_params()
    )
    want_q, want_scale, want_sum = quantize_activations(x)
    finite = np.isfinite(np.asarray(want_scale))
    assert finite.tolist() == [True, True, True, False, True, False, True, True]
    np.testing.assert_array_equal(np.asarray(q), np.asarray(want_q))
    np.testing.assert_array_equal(np.asarray(scale), np.asarray(want_scale))
    np.testing.assert_array_equal(np.asarray(row_sum), np.asarray(want_sum))


def test_a_row_that_is_not_finite_is_told_by_its_scale_whatever_its_nan():
    """A GPU's arithmetic makes NaN of all ones; a CPU's, as in the test above, ends in zeros."""
    x = np.ones((3, 256), np.float32)
    x[1, 7], x[2, 9] = np.uint32(0x7FFFFFFF).view(np.float32), -np.inf
    columns = [Columns(jnp.asarray(x), 0, x.shape[1])]
    q, scale, row_sum = quantize_rows(columns, **FEW_BLOCKS, interpret=interpret_params())
    assert np.isfinite(np.asarray(scale)).tolist() == [True, False, False]
    np.testing.assert_array_equal(np.asarray(row_sum), [127 * 256, 0, 0])
    np.testing.assert_array_equal(np.asarray(q)[0], 127)


def test_joined_columns_are_those_of_plain_jax():
    """But for values that lie halfway between two integers, up to the last bits of GELU."""
    keys = jax.random.split(jax.random.key(3), 2)
    first = jax.random.normal(keys[0], (5, 128), jnp.bfloat16)
    second = jax.random.normal(keys[1], (5, 640), jnp.bfloat16)
    parts = [Columns(first, 0, 128), Columns(second, 256, 384, gelu=True)]
    q, scale, row_sum = quantize_rows(parts, **FEW_BLOCKS, interpret=interpret_params())
    want = reference.quantize_columns(parts)
    np.testing.assert_allclose(np.asarray(scale), np.asarray(want.scale), rtol=1e-5)
    different = np.asarray(q, np.int32) - np.asarray(want.values)
    assert (different != 0).mean() < 2e-3
    assert np.abs(different).max() <= 1
    np.testing.assert_array_equal(np.asarray(row_sum), np.asarray(q, np.int32).sum(-1))


def test_rows_of_a_batch_have_vectors_of_their_own():
    keys = jax.random.split(jax.random.key(4), 3)
    x = jax.random.normal(keys[0], (6, 128), jnp.bfloat16)
    gain, shift = (jax.random.normal(key, (2, 128), jnp.bfloat16) for key in keys[1:])
    norm, columns = Modulation(gain=gain, shift=shift, eps=1e-6), [Columns(x, 0, 128)]
    q, scale, _ = quantize_rows(columns, **FEW_BLOCKS, norm=norm, interpret=interpret_params())
    want = reference.normalize_and_quantize(x, gain, shift, 1e-6)
    np.testing.assert_allclose(np.asarray(scale), np.asarray(want.scale), rtol=1e-6)
    assert np.abs(np.asarray(q, np.int32) - np.asarray(want.values)).max() <= 1
    assert (np.asarray(q) != np.asarray(want.values)).mean() < 2e-3


@pytest.mark.parametrize("with_vectors", [True, False])
def test_normalised_rows_are_those_of_plain_jax(with_vectors):
    """But for values that lie halfway between two integers, up to the order of float32 sums."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = 3 + 2 * jax.random.normal(keys[0], (5, 256), jnp.bfloat16)
    vectors = [jax.random.normal(key, (256,), jnp.bfloat16) for key in keys[1:]]
    gain, shift = (v[None] for v in vectors) if with_vectors else (None, None)
    norm = Modulation(gain=gain, shift=shift, eps=1e-6)
    interpret = interpret_params()
    q, scale, _ = quantize_rows(
        [Columns(x, 0, x.shape[1])], **FEW_BLOCKS, norm=norm, interpret=interpret
    )
    want_q, want_scale, _ = reference.normalize_and_quantize(x, gain, shift, 1e-6)
    np.testing.assert_allclose(np.asarray(scale), np.asarray(want_scale), rtol=1e-6)
    different = np.asarray(q) != np.asarray(want_q)
    assert different.mean() < 1e-3
    assert np.abs(np.asarray(q, np.int32) - np.asarray(want_q)).max() <= 1
