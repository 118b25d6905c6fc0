"""Safetensors files: what is written is read, here and by others; what is broken is named."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import safetensors_header
from convert.files import read_json
from convert.safetensors_header import parse_header, read_header
from convert.safetensors_read import SafetensorsReader, open_component
from convert.safetensors_write import write_component
from convert.tensors import read_whole
from flux_jax.errors import UserError
from tests.convert.models import Arrays, read_tensors, write_tensors

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_with(path: Path, header: object, data: bytes = b"\0" * 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "bf16": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "fp32": rng.standard_normal((2, 3, 1, 2)).astype(np.float32),
        "scalar": np.array(1.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "fp8": rng.standard_normal(7).astype(ml_dtypes.float8_e4m3fn),
    }


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", tensors(), {"key": "value"})
    found = read_tensors(path)
    for name, array in tensors().items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert read_header(path).metadata == {"key": "value"}


def test_the_reference_library_reads_our_file_and_we_read_its(tmp_path):
    arrays = {name: a for name, a in tensors().items() if name in ("bf16", "fp32", "scalar")}
    write_tensors(tmp_path / "ours.safetensors", arrays)
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    ours = read_tensors(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        assert theirs[name].tobytes() == ours[name].tobytes() == array.tobytes()


def test_tensors_are_aligned_to_their_items(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", tensors())
    for tensor in read_header(path).tensors.values():
        assert tensor.start % tensor.dtype.itemsize == 0


def test_rows_are_read_in_part(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", tensors())
    reader = SafetensorsReader.open_file(path)
    out = np.empty((2, 5), ml_dtypes.bfloat16)
    reader.read_into("bf16", 1, out)
    reader.close()
    assert out.tobytes() == tensors()["bf16"][1:].tobytes()


BROKEN = {
    "empty": (b"", None, "0 bytes are too few"),
    "truncated length": (b"\1\0\0", None, "3 bytes are too few"),
    "huge header": (struct.pack("<Q", 2**60), None, "header would be 1152921504606846976 bytes"),
    "header beyond the file": (struct.pack("<Q", 99) + b"{}", None, "truncated: the header needs"),
    "no JSON": (None, b"{nonsense", "no valid JSON"),
    "no UTF-8": (None, b'{"\xff": 1}', "no valid JSON"),
    "deep JSON": (None, b"[" * 100_000, "no valid JSON"),
    "huge number": (None, b'{"a":' + b"9" * 10_000 + b"}", "no valid JSON"),
    "a list": (None, b"[]", "no JSON object"),
    "space before": (None, b" {}", "no JSON object"),
    "duplicate tensor": (None, b'{"a": 1, "a": 2}', "key 'a' appears twice"),
    "metadata": (None, {"__metadata__": {"a": 1}}, "must map strings to strings"),
    "no entry": (None, {"a": 7}, "tensor `a` must have exactly the keys"),
    "extra key": (None, {"a": {**ENTRY, "x": 1}}, "tensor `a` must have exactly the keys"),
    "unknown dtype": (None, {"a": {**ENTRY, "dtype": "F6"}}, "tensor `a` has dtype 'F6'"),
    "dtype no string": (None, {"a": {**ENTRY, "dtype": []}}, r"tensor `a` has dtype \[\]"),
    "negative size": (None, {"a": {**ENTRY, "shape": [-2, -3]}}, "`a` has no valid shape"),
    "boolean size": (None, {"a": {**ENTRY, "shape": [True, 6]}}, "`a` has no valid shape"),
    "too many sizes": (None, {"a": {**ENTRY, "shape": [1] * 9}}, "`a` has no valid shape"),
    "overflowing size": (None, {"a": {**ENTRY, "shape": [2**63]}}, "`a` has no valid shape"),
    "offsets": (None, {"a": {**ENTRY, "data_offsets": [0]}}, "`a` has no valid data_offsets"),
    "backwards": (None, {"a": {**ENTRY, "data_offsets": [24, 0]}}, "`a` ends at byte 0 before"),
    "beyond": (None, {"a": {**ENTRY, "data_offsets": [8, 32]}}, "truncated: tensor `a` ends at"),
    "wrong length": (None, {"a": {**ENTRY, "shape": [2, 2]}}, "`a` of shape .* needs 16 bytes"),
    "gap": (
        None,
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}},
        "`a` at bytes 4..24 leaves a gap",
    ),
    "overlap": (
        None,
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        },
        "`b` at bytes 8..24 overlaps",
    ),
    "data left over": (None, {}, "tensors end at byte 0, the data at 24"),
    "unprintable name": (None, {"a\n\x1b[2J": ENTRY}, "must be at most 512 printable"),
    "lone surrogate": (None, b'{"\\ud800": 1}', "must be at most 512 printable"),
    "long name": (None, {"a" * 513: ENTRY}, "must be at most 512 printable"),
}


@pytest.mark.parametrize(("raw", "header", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, raw, header, message):
    path = tmp_path / "broken.safetensors"
    if raw is None:
        file_with(path, header)
    else:
        path.write_bytes(raw)
    with pytest.raises(UserError, match=f"broken.safetensors: .*{message}") as caught:
        read_header(path)
    assert str(caught.value).isprintable()


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match="a.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "a.safetensors")


def test_a_header_over_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 10)
    with pytest.raises(UserError, match="at most 10 are allowed"):
        read_header(file_with(tmp_path / "a.safetensors", {"a": ENTRY}))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", tensors())
    reader = SafetensorsReader.open_file(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="`bf16` ends early; has the file changed"):
        read_whole(reader, "bf16")
    reader.close()


def test_a_file_that_is_gone_when_it_is_read_is_named(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", tensors())
    reader = SafetensorsReader.open_file(path)
    path.unlink()
    with pytest.raises(UserError, match="a.safetensors: tensor `bf16` cannot be read: No such fi"):
        read_whole(reader, "bf16")


GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [16, 28]},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [28, 29]},
    "d": {"dtype": "F16", "shape": [0, 7], "data_offsets": [29, 29]},
}


def _check_against_reference(text: bytes, data_bytes: int) -> None:
    """Our verdict on a header: a `UserError`, or what the reference library reads."""
    try:
        ours = parse_header(text, data_bytes, Path("fuzzed"))
    except UserError:
        return
    raw = struct.pack("<Q", len(text)) + text + bytes(data_bytes)
    theirs = safetensors.deserialize(raw)
    assert {name for name, _ in theirs} == set(ours.tensors)
    for name, entry in theirs:
        assert tuple(entry["shape"]) == ours.tensors[name].shape
        assert len(entry["data"]) == int(
            np.prod(entry["shape"]) * ours.tensors[name].dtype.itemsize
        )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_fuzzed_bytes_are_refused_or_read_as_the_reference_reads_them(data):
    text = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if kind == "set":
            text[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del text[place : place + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            text[place:place] = data.draw(st.binary(min_size=1, max_size=6))
        else:
            text[place:place] = text[place : place + 30]
        if not text:
            break
    _check_against_reference(bytes(text), data.draw(st.sampled_from([29, 29, 29, 28, 30, 0])))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["a", "b", "c", "d", "__metadata__", "new"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]),
    value=_JSON
    | st.lists(st.integers(0, 40), max_size=4)
    | st.sampled_from(["F32", "F64", "BOOL", "F8_E4M3", "F4"]),
)
def test_fuzzed_fields_are_refused_or_read_as_the_reference_reads_them(name, key, value):
    header = json.loads(json.dumps(GOOD))
    if key is None:
        header[name] = value
    else:
        header.setdefault(name, {})[key] = value
    _check_against_reference(json.dumps(header).encode(), 29)


def test_the_fuzzed_header_is_good():
    header = parse_header(json.dumps(GOOD).encode(), 29, Path("good"))
    assert list(header.tensors) == ["a", "b", "c", "d"]


def sharded(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((2, 8)).astype(np.float32) for i in range(4)}
    write_component(folder, "model", Arrays(arrays), shard_bytes=128)
    return folder / "model.safetensors.index.json"


def change_index(index: Path, **places: str) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= places
    index.write_text(json.dumps(content))


def test_shards_are_read_as_one(tmp_path):
    index = sharded(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2
    reader = open_component(tmp_path / "m")
    assert sorted(reader.specs) == ["t0", "t1", "t2", "t3"]
    assert json.loads(index.read_text())["metadata"]["total_size"] == 256
    reader.close()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"t0": "model-00009.safetensors"}, "1 of 3 shards missing: model-00009.safetensors"),
        ({"t0": "../../etc/x.safetensors"}, "lies outside the folder, refused"),
        ({"t0": "/etc/x.safetensors"}, "lies outside the folder, refused"),
        ({"t0": "a\\..\\x.safetensors"}, "lies outside the folder, refused"),
        ({"t0": "model.bin"}, "expected a .safetensors file"),
        ({"t0": 3}, "'t0' is in 3, expected a .safetensors file"),
        ({"t0": "model-00002-of-00002.safetensors"}, "`t0` should be in .*2-of.*, found in .*1-of"),
        ({"t9": "model-00002-of-00002.safetensors"}, "`t9` should be in .*, found in no shard"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, places, message):
    index = sharded(tmp_path / "m")
    change_index(index, **places)
    with pytest.raises(UserError, match=f"model.safetensors.index.json: .*{message}"):
        open_component(tmp_path / "m")


def test_a_shard_outside_by_symbolic_link_is_read(tmp_path):
    """The hub's cache is made of such links."""
    sharded(tmp_path / "m")
    shard = tmp_path / "m" / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert len(open_component(tmp_path / "m").specs) == 4


def test_a_tensor_in_two_shards_or_in_no_index_is_named(tmp_path):
    index = sharded(tmp_path / "m")
    write_tensors(tmp_path / "m" / "more.safetensors", {"t0": np.zeros(1, np.float32)})
    change_index(index, t9="more.safetensors")
    with pytest.raises(UserError, match="`t0` is both in model-00001-of-00002.* and in more"):
        open_component(tmp_path / "m")
    write_tensors(tmp_path / "m" / "other.safetensors", {"t8": np.zeros(1, np.float32)})
    change_index(index, t9="other.safetensors")
    with pytest.raises(UserError, match="`t8` of other.safetensors is not in the index"):
        open_component(tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no `weight_map`"),
        ('{"weight_map": []}', "has no `weight_map`"),
        ("[]", "expected a JSON object, got list"),
        ("{", "not valid JSON"),
    ],
)
def test_an_unreadable_index_is_named(tmp_path, text, message):
    index = sharded(tmp_path / "m")
    index.write_text(text)
    with pytest.raises(UserError, match=f"index.json: .*{message}"):
        open_component(tmp_path / "m")


def test_a_config_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.files.MAX_JSON_BYTES", 3)
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="larger than 3 bytes, this is no config file"):
        read_json(tmp_path / "config.json")


def test_weights_of_a_folder_are_chosen_without_guessing(tmp_path):
    zeros = {"t": np.zeros(1, np.float32)}
    with pytest.raises(UserError, match="no .safetensors weights"):
        open_component(tmp_path)
    write_tensors(tmp_path / "model.fp16.safetensors", zeros)
    assert list(open_component(tmp_path).specs) == ["t"]
    write_tensors(tmp_path / "model.safetensors", {"u": zeros["t"]})
    assert list(open_component(tmp_path).specs) == ["u"]
    write_tensors(tmp_path / "again.safetensors", zeros)
    with pytest.raises(UserError, match="cannot tell which .*: again.safetensors, model.saf"):
        open_component(tmp_path)


def test_a_variant_in_shards_is_read(tmp_path):
    """Under the names that diffusers and transformers give."""
    folder = tmp_path / "m"
    index = sharded(folder)
    places = json.loads(index.read_text())["weight_map"]
    for shard in set(places.values()):
        (folder / shard).rename(folder / shard.replace("model-", "model.fp16-"))
    change_index(index, **{name: s.replace("model-", "model.fp16-") for name, s in places.items()})
    index.rename(folder / "model.safetensors.index.fp16.json")
    assert sorted(open_component(folder).specs) == ["t0", "t1", "t2", "t3"]
    write_tensors(folder / "model.safetensors", {"u": np.zeros(1, np.float32)})
    assert list(open_component(folder).specs) == ["u"]
    (folder / "model.safetensors").unlink()
    shutil.copy(
        folder / "model.safetensors.index.fp16.json",
        folder / "model.safetensors.index.bf16.json",
    )
    with pytest.raises(UserError, match="cannot tell which .*index.bf16.json, .*index.fp16.json"):
        open_component(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_folder_of_pickles_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: refused: a pickle .* .safetensors"):
        open_component(tmp_path)
