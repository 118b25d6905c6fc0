"""Scenes refuse what cannot be drawn, and survive becoming arrays."""

from __future__ import annotations

import pytest

from flux_jax.composition.scene import Scene, SceneArrays, SceneObject, pack, unpack


def thing(**changes: object) -> SceneObject:
    return SceneObject(
        **{"shape": "star", "color": "red", "x": 40, "y": 64, "radius": 15, **changes}
    )


def test_pack_and_unpack_are_inverses():
    scenes = [
        Scene(objects=(thing(),), background="white"),
        Scene(
            objects=(thing(x=20, y=20), thing(shape="heart", color="pink", x=100, radius=22)),
            background="beige",
        ),
    ]
    arrays = pack(scenes)
    assert unpack(arrays) == scenes
    assert arrays.shape.tolist() == [[4, -1, -1, -1], [4, 7, -1, -1]]
    assert unpack(SceneArrays.concatenate([arrays.take(slice(1, 2)), arrays])) == [
        scenes[1],
        *scenes,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "blob"}, "shape: expected one of circle, .*; got 'blob'"),
        ({"color": "mauve"}, "color: expected one of red, .*; got 'mauve'"),
        ({"x": 10}, r"object at \(10, 64\) with radius 15 leaves the canvas of 128 x 128"),
    ],
)
def test_impossible_objects_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        thing(**changes)


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="background: expected one of white, .*; got 'red'"):
        Scene(objects=(thing(),), background="red")
    with pytest.raises(ValueError, match="objects: expected 1 to 4 in a scene; got 5"):
        Scene(objects=(thing(),) * 5, background="white")
