"""Orbax checkpoints: what we write, Orbax restores; what Orbax writes, we read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from convert import orbax_write
from convert.orbax_common import flatten, nest
from convert.orbax_read import OrbaxReader, restore_onto
from convert.orbax_write import chunk_rows, write_checkpoint
from convert.tensors import Spec, read_whole
from flux_jax.errors import UserError
from tests.convert.models import Arrays

BF16 = np.dtype(ml_dtypes.bfloat16)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.0.weight": rng.standard_normal((16, 8)).astype(BF16),
        "a.1.weight": rng.standard_normal((24, 2, 3, 3)).astype(np.float32),
        "a.10.bias": rng.standard_normal(7).astype(np.float16),
        "scale": np.array(2.5, np.float32),
        "zeros": np.zeros((4, 4), BF16),
    }


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A checkpoint whose larger arrays have several chunks."""
    monkeypatch.setattr(orbax_write, "_CHUNK_BYTES", 64)
    write_checkpoint(tmp_path / "ckpt", Arrays(arrays()))
    return tmp_path / "ckpt"


def test_plain_orbax_restores_it_without_being_told_anything(written):
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten(checkpointer.restore(written))
    assert restored.keys() == arrays().keys()
    for name, array in arrays().items():
        assert restored[name].dtype == array.dtype
        assert np.asarray(restored[name]).tobytes() == array.tobytes()


def test_plain_orbax_restores_it_straight_onto_a_mesh(written):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    specs = {"a.0.weight": PartitionSpec("x", "y"), "a.1.weight": PartitionSpec("y")}
    target = {
        name: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, specs.get(name, PartitionSpec()))
        )
        for name, a in arrays().items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten(checkpointer.restore(written, nest(target)))
    for name, array in arrays().items():
        assert restored[name].sharding == target[name].sharding
        assert np.asarray(restored[name]).tobytes() == array.tobytes()


def test_restore_onto_casts_and_places(written):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    place = NamedSharding(mesh, PartitionSpec("x"))
    wanted = {
        name: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=place)
        for name, a in arrays().items()
        if name == "a.0.weight"
    }
    with pytest.raises(UserError, match="damaged checkpoint: User-provided restore item"):
        restore_onto(written, wanted)
    replicated = NamedSharding(mesh, PartitionSpec())
    wanted |= {
        name: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=replicated)
        for name, a in arrays().items()
        if name != "a.0.weight"
    }
    restored = restore_onto(written, wanted)
    for name, array in arrays().items():
        assert restored[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(restored[name], array.astype(np.float32))


def test_we_read_it_back(written):
    reader = OrbaxReader(written)
    assert reader.specs == {n: Spec(a.shape, a.dtype) for n, a in arrays().items()}
    for name, array in arrays().items():
        assert read_whole(reader, name).tobytes() == array.tobytes()


def test_a_path_may_lead_through_its_parents(written, monkeypatch):
    """TensorStore takes none that does."""
    (written.parent / "beside").mkdir()
    monkeypatch.chdir(written.parent / "beside")
    reader = OrbaxReader(Path("../ckpt"))
    assert read_whole(reader, "scale").tobytes() == arrays()["scale"].tobytes()
    write_checkpoint(Path("../beside/../again"), Arrays(arrays()))
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
        for name, array in arrays().items()
    }
    assert restore_onto(Path("../again"), wanted)["scale"] == arrays()["scale"]


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, False), (False, False), (True, True)])
def test_we_read_what_a_training_loop_wrote(tmp_path, ocdbt, zarr3):
    tree = nest({name: jnp.asarray(array) for name, array in arrays().items()})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "ckpt", args=ocp.args.PyTreeSave(tree))
    reader = OrbaxReader(tmp_path / "ckpt")
    reader.check_chunks()
    for name, array in arrays().items():
        assert read_whole(reader, name).tobytes() == array.tobytes()


def test_a_missing_chunk_is_damage_and_not_zeros(written):
    (written / "zeros" / "0.0").unlink()
    reader = OrbaxReader(written)
    with pytest.raises(UserError, match="ckpt: damaged checkpoint: array `zeros`: "):
        read_whole(reader, "zeros")
    with pytest.raises(UserError, match="array `zeros`: chunk 0.0 is missing"):
        reader.check_chunks()


def test_a_chunk_that_was_cut_off_is_found_before_orbax_reads(written):
    (chunk,) = (written / "scale").glob("[0-9]*")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    message = rf"array `scale`: chunk \S+ has {len(content) - 1} bytes, expected {len(content)}"
    with pytest.raises(UserError, match=message):
        OrbaxReader(written).check_chunks()


def test_a_missing_array_is_named(written):
    (written / "scale" / ".zarray").unlink()
    with pytest.raises(UserError, match="ckpt: damaged checkpoint: array `scale`: ") as raised:
        OrbaxReader(written)
    # What is wrong, and not the array's whole specification too.
    assert str(raised.value).endswith("does not exist")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no Orbax checkpoint"):
        OrbaxReader(tmp_path)
    (tmp_path / "_METADATA").write_text('{"tree_metadata": [1]}')
    with pytest.raises(UserError, match="_METADATA: not the metadata of an Orbax checkpoint"):
        OrbaxReader(tmp_path)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((21504, 3072), 5376),  # 132 MB in four chunks
        ((3072, 3072), 3072),  # small enough for one
        ((9216, 3072), 4608),
        ((3072,), 3072),
        ((), 1),
        ((7, 4_000_000), 4),  # seven does not divide: 4 + 3
        ((1, 40_000_000), 1),  # a row larger than a chunk
    ],
)
def test_chunks_divide_the_rows_by_powers_of_two(shape, rows):
    assert chunk_rows(Spec(shape, BF16), 32 << 20) == rows


def test_nest_and_flatten():
    flat = {"a.0.b": 1, "a.1.b": 2, "c": 3}
    assert nest(flat) == {"a": {"0": {"b": 1}, "1": {"b": 2}}, "c": 3}
    assert flatten(nest(flat)) == flat
    assert flatten({"a": [4, (5,)]}) == {"a.0": 4, "a.1.0": 5}
