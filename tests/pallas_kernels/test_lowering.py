"""The Mosaic kernels lowered for a GPU that need not be here: what interpret mode cannot refuse.

Lowering checks layouts, strides and types as on the device; it does not assemble. It takes a
fraction of a second.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic, packed_width
from pallas_kernels.operands import Operands
from pallas_kernels.packing import group_count
from pallas_kernels.reference import Columns
from pallas_kernels.tile_table import Device
from pallas_kernels.tiles import INT8_TILES, SHARED, DirectTile

H200 = Device(kind="NVIDIA H200", multiprocessors=132)
FLOATS = ("float32", "float16", "bfloat16")


def lower(function, *shapes):
    """Shapes are of (size, dtype); None stays."""
    given = [None if s is None else jax.ShapeDtypeStruct(*s) for s in shapes]
    jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))


def lower_product(
    m, n, k, bits, *, out="bfloat16", scale="channel", extras=False, gates=1, rank=0, tile=None
):
    columns = {"tensor": (), "channel": (n,), "group": (n, group_count(k))}[scale]

    def product(x, packed, scale, bias, gate, residual, u, v):
        return mosaic.ternary_matmul(
            x,
            packed,
            Operands(scale, bias, gate=gate, residual=residual, u=u, v=v),
            activation_bits=bits,
            out_dtype=out,
            device=H200,
            gelu=extras,
            tile=tile,
        )

    lower(
        product,
        ((m, k), "bfloat16"),
        ((n, packed_width(k)), "uint8"),
        (columns, out),
        ((n,), out) if extras else None,
        ((gates, n), out) if extras else None,
        ((m, n), out) if extras else None,
        ((m, rank), "bfloat16") if rank else None,
        ((n, rank), "bfloat16") if rank else None,
    )


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize(("m", "bits"), [(1, 8), (40, 16), (4608, 8), (4608, 16)])
def test_products_with_all_that_surrounds_them(m, bits, out):
    lower_product(m, 200, 640, bits, out=out, extras=True)


@pytest.mark.parametrize("tile", [tile for tile, _ in INT8_TILES], ids=str)
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 64])
def test_every_tile_of_the_rules(tile, out, rank):
    lower_product(300, 520, 640, 8, out=out, extras=True, rank=rank, tile=tile)


@pytest.mark.parametrize(("m", "bits"), [(5, 8), (40, 16)])
@pytest.mark.parametrize("scale", ["tensor", "group"])
def test_other_scales(m, bits, scale):
    lower_product(m, 200, 640, bits, scale=scale)


@pytest.mark.parametrize(("m", "bits"), [(5, 16), (40, 8), (300, 8), (300, 16)])
@pytest.mark.parametrize(("n", "k"), [(1, 256), (63, 8), (65, 31), (101, 1)])
def test_products_of_odd_sizes(m, n, k, bits):
    lower_product(m, n, k, bits, extras=True)


@pytest.mark.parametrize("bits", [8, 16])
def test_odd_sizes_with_a_scale_per_group(bits):
    lower_product(5, 63, 200, bits, scale="group")


@pytest.mark.parametrize("rank", [16, 200])
@pytest.mark.parametrize("n", [3072, 9216, 12288, 200])
@pytest.mark.parametrize("bits", [8, 16])
def test_low_rank_branches(bits, n, rank):
    """In each of the tiles that FLUX.1's products have, and others'."""
    lower_product(4608, n, 3072, bits, rank=rank, extras=True)
    lower_product(300, n, 640, bits, rank=rank, scale="group")


@pytest.mark.parametrize("m", [5, 40])
def test_a_low_rank_branch_of_a_few_rows(m):
    lower_product(m, 200, 640, 8, rank=16, extras=True)


def test_two_gates_in_a_tile():
    lower_product(256, 64, 640, 8, extras=True, gates=2)
    lower_product(4, 65, 640, 16, extras=True, gates=2)


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_that_a_block_shares(bits):
    tile = DirectTile(groups=3, rows=48, outputs=144, activations=SHARED)
    lower_product(16, 9216, 3072, bits, tile=tile, extras=True)


@pytest.mark.parametrize("vectors", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [128, 3072])
def test_rows_that_are_normalised_and_quantised(k, dtype, vectors):
    def rows(x, gain, shift):
        return mosaic.normalize_and_quantize(x, gain, shift, eps=1e-6, device=H200)

    lower(rows, ((8, k), dtype), ((1, k), vectors), ((1, k), vectors))
    lower(rows, ((8, k), dtype), ((2, k), vectors), None)


def test_columns_that_are_quantised():
    def rows(x, y):
        return mosaic.quantize([Columns(x, 0, 3072), Columns(y, 9216, 12288, True)], device=H200)

    lower(rows, ((8, 3072), "bfloat16"), ((8, 21504), "bfloat16"))


@pytest.mark.parametrize("m", [5, 4608])
def test_products_under_64_bit_types(m):
    with jax.enable_x64(True):
        lower_product(m, 200, 640, 8, extras=True)
        assert jnp.zeros(1).dtype == jnp.float64
