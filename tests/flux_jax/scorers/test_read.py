"""Published prompt files are read as published; what is wrong in one is named with its line."""

from __future__ import annotations

import json

import pytest

from flux_jax.errors import UserError
from flux_jax.scorers.compbench import CompBench
from flux_jax.scorers.dpg import DPGBench
from flux_jax.scorers.geneval import GenEval

ENTRY = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}]}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_geneval(tmp_path):
    entries = [{**ENTRY, "prompt": f"a photo of {n} stars"} for n in ("two", "three")]
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, entries)) + "\n")
    items = GenEval().read(path)
    assert [item.metadata for item in items] == entries
    assert [item.prompt for item in items] == ["a photo of two stars", "a photo of three stars"]


def test_compbench(tmp_path):
    """With the ends of lines of Windows, as color_val.txt has them, and none after the last."""
    path = write(
        tmp_path / "color_val.txt", "a green bench and a blue bowl\r\na red cup\t3\r\na cat"
    )
    prompts = [item.prompt for item in CompBench().read(path)]
    assert prompts == ["a green bench and a blue bowl", "a red cup", "a cat"]


def test_dpg_folder_and_csv(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    write(folder / "whoops3.txt", "A long,\nlong scene.\n")
    write(folder / "0.txt", "An expansive field.")
    expected = [("0", "An expansive field."), ("whoops3", "A long,\nlong scene.")]
    items = DPGBench().read(folder)
    assert [(item.name, item.prompt) for item in items] == expected
    rows = "item_id,text,proposition_id\n"
    rows += '0,An expansive field.,1\n0,An expansive field.,2\nwhoops3,"A long,\nlong scene.",1\n'
    items = DPGBench().read(write(tmp_path / "dpg_bench.csv", rows))
    assert [(item.name, item.prompt) for item in items] == expected


@pytest.mark.parametrize(
    ("layout", "text", "message"),
    [
        (GenEval, json.dumps({**ENTRY, "prompt": "a"}) + "\n{", "line 2: not valid JSON"),
        (GenEval, "[" * 100_000, "line 1: not valid JSON: nested too deeply"),
        (GenEval, f'{{"n": {"1" * 5000}}}', "line 1: not valid JSON: a number has too many digits"),
        (GenEval, "[1]", "line 1: must be a JSON object"),
        (GenEval, json.dumps(ENTRY), "line 1: needs 'prompt', .* it has tag, include"),
        (GenEval, json.dumps({**ENTRY, "prompt": 3}), "line 1: needs 'prompt'"),
        (GenEval, "", "is empty"),
        (GenEval, b"{}\n\xff", "line 2: is not UTF-8 text"),
        (CompBench, "a cat\n\na dog", "line 2: is empty"),
        (CompBench, "a cat\na dog_house", "line 2: has a '_'"),
        (CompBench, "a cat and/or a dog", "line 1: has a '/'"),
        (CompBench, "a cat\n" + "long " * 60, "line 2: is too long for a file's name"),
        (CompBench, "a cat\n\tb", "line 2: is no prompt"),
        (DPGBench, "id,text\n", "line 1: needs the columns item_id and text"),
        (DPGBench, "item_id,text\n0,a\n1,\n", "line 3: has no item_id or no text"),
        (DPGBench, "item_id,text\n0,a\n0,b\n", "line 3: another text for item '0'"),
        (DPGBench, "item_id,text\n0.1,a\n", "'0.1' is no name that DPG-Bench can look up"),
        (DPGBench, 'item_id,text\n0,"a', "is no CSV"),
        (DPGBench, "item_id,text\n", "line 2: is missing"),
    ],
)
def test_refusals_name_the_line(tmp_path, layout, text, message):
    with pytest.raises(UserError, match=message):
        layout().read(write(tmp_path / "prompts", text))


def test_files_that_are_not_there(tmp_path):
    for layout in (GenEval, CompBench, DPGBench):
        with pytest.raises(UserError, match="cannot read"):
            layout().read(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no \.txt file"):
        DPGBench().read(tmp_path)
    write(tmp_path / "0.txt", " \n")
    with pytest.raises(UserError, match=r"0\.txt, line 1: is empty"):
        DPGBench().read(tmp_path)


@pytest.mark.parametrize(
    ("name", "scorers"),
    [
        ("color_val.txt", ["BLIP_vqa.py"]),
        ("spatial_val.txt", ["2D_spatial_eval.py"]),
        ("3d_spatial_val.txt", ["3D_spatial_eval.py"]),
        ("non_spatial_val.txt", ["CLIP_similarity.py"]),
        ("numeracy_val.txt", ["numeracy_eval.py"]),
        (
            "complex_val.txt",
            ["BLIP_vqa.py", "2D_spatial_eval.py", "CLIP_similarity.py", "3_in_1.py"],
        ),
        ("mine.txt", ["no known category"]),
    ],
)
def test_each_category_has_its_scorer(tmp_path, name, scorers):
    folder = tmp_path / "with space"
    commands = CompBench().commands(folder, tmp_path / name, samples=10, side=512)
    assert len(commands) == len(scorers)
    for command, scorer in zip(commands, scorers, strict=True):
        assert scorer in command
        assert f"'{folder}'" in command or scorers == ["no known category"]
