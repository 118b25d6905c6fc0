"""Drawings: the same from NumPy and from JAX under jit, inside their boxes, in their colours."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.composition.render import coverage, draw, render, to_uint8
from flux_jax.composition.scene import Scene, SceneArrays, SceneObject, pack
from flux_jax.composition.vocabulary import BACKGROUNDS, COLORS, SHAPES


def eight_scenes() -> SceneArrays:
    """Every shape, colour and background at least once, one to four objects."""
    return pack(
        [
            Scene(
                objects=tuple(
                    SceneObject(
                        shape=SHAPES[(row + slot) % 8],
                        color=list(COLORS)[(2 * row + slot) % 8],
                        x=30 + 60 * (slot % 2),
                        y=30 + 60 * (slot // 2),
                        radius=13 + row,
                    )
                    for slot in range(row % 4 + 1)
                ),
                background=list(BACKGROUNDS)[row % 5],
            )
            for row in range(8)
        ]
    )


@pytest.mark.parametrize("size", [128, 64])
def test_numpy_and_jax_draw_the_same(size):
    scenes = eight_scenes()
    expected = render(scenes, size)
    drawn = jax.jit(partial(render, size=size))(jax.tree.map(jnp.asarray, scenes))
    assert expected.shape == (8, size, size, 3)
    assert expected.dtype == np.float32
    assert drawn.dtype == jnp.float32
    # Rounding of a distance by 1e-6 radii moves a rim pixel by 22 * 1e-6 * 2 at most.
    np.testing.assert_allclose(np.asarray(drawn), expected, atol=2e-4)
    assert np.abs(expected).max() <= 1.0


def test_pixels_have_the_named_colors():
    ring = SceneObject(shape="ring", color="blue", x=64, y=40, radius=20)
    image = draw(Scene(objects=(ring,), background="beige"))
    assert tuple(image[0, 0]) == BACKGROUNDS["beige"]
    assert tuple(image[40, 64]) == BACKGROUNDS["beige"]  # the hole
    assert tuple(image[40, 64 + 14]) == COLORS["blue"]
    assert tuple(image[40 + 14, 64]) == COLORS["blue"]


@pytest.mark.parametrize("radius", [13, 22])
def test_shapes_fill_their_box_and_stay_inside(radius):
    shapes = np.arange(len(SHAPES))
    centre, radii = np.full(len(SHAPES), 64), np.full(len(SHAPES), radius)
    covered = coverage(np, shapes, centre, centre, radii, 128)
    for mask in covered > 0:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        for low, high in ((rows[0], rows[-1]), (columns[0], columns[-1])):
            assert low >= 64 - radius - 1  # a rim pixel may be touched
            assert high <= 64 + radius
        assert max(np.ptp(rows), np.ptp(columns)) >= 1.65 * radius


def test_anti_aliasing_keeps_the_area():
    """A disk's coverage adds up to its area, to a thousandth: no pixel is counted whole."""
    one = np.array([SHAPES.index("circle")])
    covered = coverage(np, one, np.array([64]), np.array([64]), np.array([20]), 128)
    assert covered.sum() == pytest.approx(np.pi * (0.96 * 20) ** 2, rel=1e-3)


def test_free_slots_are_not_drawn():
    empty = SceneArrays.empty(1)
    assert (to_uint8(render(empty)) == BACKGROUNDS["white"]).all()
