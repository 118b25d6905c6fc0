"""Training data in bulk: held out what must be, the same from one seed, and it survives a file."""

from __future__ import annotations

import numpy as np
import pytest

from examples.tiny_flux import scenes
from examples.tiny_flux.scenes import (
    CATEGORIES,
    TrainingData,
    encode_captions,
    make_training_data,
    sample_captions,
)
from flux_jax.composition.layout import shows_held_out
from flux_jax.composition.vocabulary import COLORS, HELD_OUT_PAIRS, SHAPES


@pytest.fixture(scope="module")
def drawn():
    return sample_captions(seed=0, chunk=0, count=4000)


def test_no_held_out_pair_or_arrangement_is_drawn(drawn):
    _, arrays = drawn
    there = arrays.shape >= 0
    pairs = set(zip(arrays.color[there].tolist(), arrays.shape[there].tolist(), strict=True))
    names = {(list(COLORS)[color], SHAPES[shape]) for color, shape in pairs}
    assert names.isdisjoint(HELD_OUT_PAIRS)
    assert len(names) == 64 - len(HELD_OUT_PAIRS)  # and every other pair is
    assert not shows_held_out(arrays).any()


def test_one_to_four_objects_on_all_backgrounds(drawn):
    _, arrays = drawn
    numbers = np.bincount((arrays.shape >= 0).sum(axis=1), minlength=5)
    assert numbers[0] == 0
    assert (numbers[1:] > 0.05 * len(arrays.shape)).all()
    assert np.bincount(arrays.background).min() > 0.15 * len(arrays.shape)
    assert sum(CATEGORIES.values()) == pytest.approx(1.0)


def test_chunks_are_reproducible_and_differ(drawn):
    again = sample_captions(seed=0, chunk=0, count=4000)
    assert again[0] == drawn[0]
    for a, b in zip(again[1], drawn[1], strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, chunk in ((0, 1), (1, 0)):
        assert sample_captions(seed, chunk, count=50)[0] != drawn[0][:50]


def test_bulk_data_survives_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "CHUNK", 64)
    # `sample_captions` bound its default when it was defined.
    monkeypatch.setattr(scenes.sample_captions, "__defaults__", (64,))
    data = make_training_data(100, seed=2)
    assert len(data) == 128
    assert data.t5_ids.shape == (128, 40)
    assert data.clip_ids.shape == (128, 42)
    assert data.t5_ids.dtype == data.clip_ids.dtype == np.int16
    second = make_training_data(64, seed=2, first_chunk=1)
    np.testing.assert_array_equal(second.t5_ids, data.t5_ids[64:])
    data.save(tmp_path / "scenes.npz")
    loaded = TrainingData.load(tmp_path / "scenes.npz")
    np.testing.assert_array_equal(loaded.t5_ids, data.t5_ids)
    np.testing.assert_array_equal(loaded.clip_ids, data.clip_ids)
    for a, b in zip(loaded.scenes, data.scenes, strict=True):
        np.testing.assert_array_equal(a, b)


def test_captions_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="caption of 51 tokens does not fit into 40: 'star star"):
        encode_captions([" ".join(["star"] * 50)])
