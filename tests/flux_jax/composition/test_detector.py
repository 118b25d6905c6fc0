"""The detector sees what was drawn, also through blur and noise, and nothing else."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from examples.tiny_flux.scenes import sample_captions
from flux_jax.composition import detector
from flux_jax.composition.detector import Detection, detect
from flux_jax.composition.render import draw, render, to_uint8
from flux_jax.composition.scene import Scene, SceneObject, pack, unpack
from flux_jax.composition.vocabulary import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, SHAPES


@cache
def some_scenes() -> list[Scene]:
    return unpack(sample_captions(seed=5, chunk=0, count=150)[1])


def degrade(pictures: np.ndarray, blur: float, noise: float) -> np.ndarray:
    """What an autoencoder does: softer edges, and errors that are smooth over a few pixels."""
    rng = np.random.default_rng(0)
    errors = ndimage.gaussian_filter(rng.normal(size=pictures.shape), (0, 0.7, 0.7, 0))
    soft = ndimage.gaussian_filter(pictures, (0, blur, blur, 0))
    return to_uint8(soft + errors / errors.std() * noise / 127.5)


def seen(detection: Detection) -> list[tuple[str | None, str | None]]:
    return sorted(((item.shape, item.color) for item in detection.objects), key=str)


@pytest.mark.parametrize(
    ("blur", "noise", "decibels", "least"),
    [(0.01, 0.0, 60, 1.0), (0.7, 6.0, 31, 1.0), (1.0, 8.0, 28, 1.0), (1.3, 10.0, 26, 0.98)],
)
def test_drawn_scenes_are_seen_exactly(blur, noise, decibels, least):
    """All objects with shape and colour, and the background; autoencoders reach 30 to 35 dB."""
    scenes = some_scenes()
    clean = render(pack(scenes))
    images = degrade(clean, blur, noise)
    error = np.mean((images / 127.5 - 1 - clean) ** 2)
    assert 10 * np.log10(4 / error) >= decibels
    right = 0
    for scene, image in zip(scenes, images, strict=True):
        detection = detect(image)
        same = seen(detection) == sorted(((o.shape, o.color) for o in scene.objects), key=str)
        right += same and detection.background == scene.background
    assert right / len(scenes) >= least


def test_places_and_sizes_are_measured():
    for scene in some_scenes()[:60]:
        detection = detect(draw(scene))
        for item in scene.objects:
            near = min(detection.objects, key=lambda o: abs(o.x - item.x) + abs(o.y - item.y))
            # The box of a triangle or star is up to two units off its radius' box.
            assert abs(near.x - item.x) <= 1.5
            assert abs(near.y - item.y) <= 2.5
            assert abs(near.radius - item.radius) <= 1.0
            assert near.confidence >= 0.85


def test_larger_pictures_are_seen_alike():
    for scene in some_scenes()[:5]:
        assert seen(detect(draw(scene, 256))) == seen(detect(draw(scene)))


@pytest.mark.parametrize(("color", "shape"), sorted(HELD_OUT_PAIRS))
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_held_out_pairs_are_seen_too(color, shape, background):
    item = SceneObject(shape=shape, color=color, x=60, y=70, radius=13)
    assert seen(detect(draw(Scene(objects=(item,), background=background)))) == [(shape, color)]


def test_templates_of_different_shapes_are_far_apart():
    """No shape overlaps another's template by 0.85; a clean drawing reaches 0.9 with its own."""
    table, _, owners, _ = detector._templates()
    for index in range(len(SHAPES)):
        plain = table[owners == index][13]
        overlap = np.minimum(plain, table).sum(axis=1) / np.maximum(plain, table).sum(axis=1)
        assert overlap[owners != index].max() < 0.85


def test_an_empty_picture_holds_nothing():
    plain = np.full((128, 128, 3), BACKGROUNDS["navy"], np.uint8)
    assert detect(plain) == Detection(objects=(), background="navy")


def test_an_unknown_background_has_no_name():
    plain = np.full((128, 128, 3), (30, 120, 60), np.uint8)
    assert detect(plain).background is None


def paint(image: np.ndarray, rows: slice, columns: slice, color: tuple[int, ...]) -> None:
    image[rows, columns] = color


def test_shapes_and_colors_outside_the_vocabulary_are_unnamed():
    image = np.full((128, 128, 3), 255, np.uint8)
    paint(image, slice(20, 28), slice(20, 70), COLORS["red"])  # a bar
    paint(image, slice(60, 90), slice(60, 90), (90, 90, 20))  # an olive square
    assert seen(detect(image)) == [("square", None), (None, "red")]


def test_specks_and_thin_lines_are_ignored():
    image = np.full((128, 128, 3), 255, np.uint8)
    paint(image, slice(20, 25), slice(20, 25), COLORS["red"])
    paint(image, slice(60, 62), slice(10, 110), COLORS["blue"])
    assert detect(image).objects == ()


def test_touching_objects_of_one_color_are_one():
    image = np.full((128, 128, 3), 255, np.uint8)
    paint(image, slice(20, 50), slice(20, 50), COLORS["red"])
    paint(image, slice(20, 50), slice(50, 80), COLORS["red"])
    assert seen(detect(image)) == [(None, "red")]


def test_a_blend_of_two_objects_is_neither():
    """A square, half red and half blue: two parts, neither of them a square."""
    image = np.full((128, 128, 3), 255, np.uint8)
    paint(image, slice(40, 76), slice(40, 58), COLORS["red"])
    paint(image, slice(40, 76), slice(58, 76), COLORS["blue"])
    assert all(item.shape is None for item in detect(image).objects)


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"uint8 of shape \(side, side, 3\); got float32 of"):
        detect(np.zeros((128, 128, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a square; got 64 x 128"):
        detect(np.zeros((64, 128, 3), np.uint8))
