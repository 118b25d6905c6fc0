"""The packing benchmark on the tiny model."""

from benchmarks.ternary_packing import measure, ternary_shapes
from flux_jax.configs import FluxConfig


def test_shapes_are_flux_devs():
    shapes = ternary_shapes(FluxConfig.dev())
    assert sum(shapes.values()) == 304
    assert shapes[21504, 3072] == shapes[3072, 15360] == 38
    assert sum(count * rows * columns for (rows, columns), count in shapes.items()) == 11834228736


def test_every_operation_is_timed():
    seconds, weights = measure(FluxConfig.tiny(), repeats=1)
    assert set(seconds) == {"quantize", "pack", "unpack", "load", "memcpy"}
    assert min(seconds.values()) > 0
    assert weights == sum(
        count * rows * columns
        for (rows, columns), count in ternary_shapes(FluxConfig.tiny()).items()
    )
