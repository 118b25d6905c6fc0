"""float8 checkpoints: every code, every kind of scale, exactly as documented."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert.fp8 import Dequantized, has_float8
from convert.tensors import read_whole
from flux_jax.errors import UserError
from tests.convert.models import Arrays

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BF16 = np.dtype(ml_dtypes.bfloat16)
CODES = np.arange(256, dtype=np.uint8)


def dequantized(arrays, dtype, name="w.weight"):
    return read_whole(Dequantized(Arrays(arrays), dtype, what="file"), name)


def assert_same(found, expected):
    """Equal in dtype and value, NaNs in the same places. (numpy knows no NaN in bfloat16.)"""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
def test_every_plain_code_means_its_own_value(kind, dtype):
    codes = CODES.view(kind).reshape(64, 4)
    expected = codes.astype(np.float64).astype(dtype)
    found = dequantized({"w.weight": codes}, dtype)
    assert_same(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
@pytest.mark.parametrize("name", ["w.scale_weight", "w.weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_multiplies_in_float32_and_rounds_once(dtype, name, shape):
    codes = CODES.view(E4M3).reshape(32, 8)
    scale = np.full(shape, 0.0037, np.float32)
    product = codes.astype(np.float32) * np.float32(0.0037)
    found = dequantized({"w.weight": codes, name: scale}, dtype)
    assert_same(found, product.astype(dtype))


@pytest.mark.parametrize("shape", [(32,), (32, 1)])
def test_a_scale_for_each_row(shape):
    codes = CODES.view(E4M3).reshape(32, 8)
    scale = np.linspace(0.5, 2, 32, dtype=np.float32).reshape(shape)
    expected = (codes.astype(np.float32) * scale.reshape(32, 1)).astype(BF16)
    found = dequantized({"w.weight": codes, "w.weight_scale": scale}, BF16)
    assert_same(found, expected)


@pytest.mark.parametrize("shape", [(), (32,)])
def test_a_scale_that_overflows_float16_is_named(shape):
    codes = CODES.view(E4M3).reshape(32, 8)
    arrays = {"w.weight": codes, "w.weight_scale": np.full(shape, 200, np.float32)}
    with pytest.raises(UserError, match="file: tensor `w.weight` has values beyond the range of"):
        dequantized(arrays, np.dtype(np.float16))
    # A code that overflows but does not occur is no reason.
    arrays["w.weight"] = np.full((32, 8), 1.0, np.float32).astype(E4M3)
    assert (dequantized(arrays, np.dtype(np.float16)) == 200).all()


def test_rows_of_a_dequantised_weight_are_those_of_the_whole():
    codes = CODES.view(E4M3).reshape(32, 8)
    scale = np.linspace(0.5, 2, 32, dtype=np.float32)
    reader = Dequantized(Arrays({"w.weight": codes, "w.weight_scale": scale}), BF16, what="file")
    part = np.empty((5, 8), BF16)
    reader.read_into("w.weight", 20, part)
    assert_same(part, read_whole(reader, "w.weight")[20:25])


def test_what_is_not_a_weight_is_dropped_with_a_reason_and_the_rest_passes_through():
    note = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    arrays = {
        "scaled_fp8": np.zeros(0, E4M3),
        "w.weight": CODES[:8].view(E4M3),
        "w.scale_weight": np.ones((), np.float32),
        "w.scale_input": np.ones((), np.float32),
        "w.input_scale": np.ones((), np.float32),
        "w.comfy_quant": note,
        "w.bias": np.ones(8, np.float16),
    }
    reader = Dequantized(Arrays(arrays), None, what="file")
    assert {n: s.dtype for n, s in reader.specs.items()} == {
        "w.weight": BF16,
        "w.bias": np.dtype(np.float16),
    }
    assert read_whole(reader, "w.bias").tobytes() == arrays["w.bias"].tobytes()
    assert sorted(name for name, _ in reader.dropped) == [
        "scaled_fp8",
        "w.comfy_quant",
        "w.input_scale",
        "w.scale_input",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x.scale_weight": np.ones((), np.float32)},
            "`x.scale_weight` scales `x.weight`, which is",
        ),
        (
            {"w.weight": np.ones(8, np.float32)},
            "`w.weight`, which has dtype float32, expected float8",
        ),
        ({"w.weight_scale": np.ones(3, np.float32)}, "scale of tensor `w.weight` has 3 values"),
        (
            {"w.weight_scale": np.ones((2, 4), np.float32)},
            r"`w.weight_scale` is no scale: .*\[2, 4\]",
        ),
        ({"w.scale_weight": np.ones((), np.float32)}, "tensor `w.weight` has two scales, expected"),
        ({"w.weight_scale": np.ones((), np.int32)}, "is no scale: dtype int32"),
        ({"w.weight_scale": np.float32("nan").reshape(())}, "scales that are not finite"),
        ({"w.comfy_quant": np.frombuffer(b"{", np.uint8)}, "no readable quantisation note"),
        ({"w.comfy_quant": np.frombuffer(b"[" * 100_000, np.uint8)}, "note: .*nested too deeply"),
        ({"w.comfy_quant": np.frombuffer(b"[]", np.uint8)}, "note: it names no format"),
        ({"w.comfy_quant": np.frombuffer(b'{"format":"nvfp4"}', np.uint8)}, "says format 'nvfp4'"),
    ],
)
def test_scales_that_make_no_sense_are_named(change, message):
    arrays = {"w.weight": CODES[:8].view(E4M3), "w.weight_scale": np.ones((), np.float32)}
    with pytest.raises(UserError, match=f"^file: .*{message}"):
        Dequantized(Arrays(arrays | change), BF16, what="file")


def test_ordinary_checkpoints_are_not_taken_for_float8():
    assert not has_float8(Arrays({"w.weight": np.ones(2, np.float32), "norm.scale": np.ones(2)}))
    assert has_float8(Arrays({"w.weight": CODES.view(E5M2)}))
