"""Tokenizers from folders as they may be: damaged, absent, without a limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5Tokenizer

from flux_jax.assets import TEACHER, shipped_path
from flux_jax.errors import UserError
from flux_jax.tokenization import load_tokenizer, max_length, stored_max_length, tokenize


@pytest.mark.parametrize("content", ["{", "null", "[]", '{"model": {}}', "\xff"])
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_damaged_tokenizer_is_one_line(tmp_path, name, content):
    folder = tmp_path / name
    shutil.copytree(shipped_path(TEACHER) / name, folder)
    (folder / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=f"^no usable tokenizer in {folder}: .") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)


ALONE = """
import sys
from pathlib import Path
from flux_jax.tokenization import load_tokenizer, tokenize
for name in ("tokenizer", "tokenizer_2"):
    tokenize(load_tokenizer(Path(sys.argv[1]) / name), ["a red circle"], 16, encoder=name)
print("transformers" in sys.modules, "torch" in sys.modules)
"""


def test_flux_tokenizers_need_no_transformers():
    """Importing it takes longer than all else that a prompt needs."""
    command = [sys.executable, "-c", ALONE, str(shipped_path(TEACHER))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split() == ["False", "False"]


def without_json(tmp_path):
    """CLIP's tokenizer as FLUX.1 has it: a vocabulary and merges."""
    folder = tmp_path / "bare"
    shutil.copytree(shipped_path(TEACHER) / "tokenizer", folder)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture(scope="module", params=["tokenizer", "tokenizer_2", "bare"])
def pair(request, tmp_path_factory):
    """A tokenizer of ours, and the same by transformers."""
    if request.param == "bare":
        folder = without_json(tmp_path_factory.mktemp("tokenizers"))
    else:
        folder = shipped_path(TEACHER) / request.param
    theirs = T5Tokenizer if request.param == "tokenizer_2" else CLIPTokenizer
    return load_tokenizer(folder), theirs.from_pretrained(str(folder))


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["a red circle", "<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "it's"]),
    st.sampled_from(["  two\t\n", "\u00e9", "e\u0301", "\u0130", "\ufb01", "3.14", "\U0001f600"]),
)


@given(texts=st.lists(st.lists(PIECES, max_size=8).map(" ".join), min_size=1, max_size=4))
def test_ids_and_texts_are_those_of_transformers(pair, texts):
    ours, theirs = pair
    plain: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    for options in ({}, plain, {"padding": "max_length", "max_length": 9, "truncation": True}):
        ids = ours(texts, **options)["input_ids"]
        assert ids == theirs(texts, **options)["input_ids"]
    assert [ours.decode(each) for each in ids] == [theirs.decode(each) for each in ids]
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    assert (ours.pad_token_id, max_length(ours)) == (theirs.pad_token_id, max_length(theirs))


def test_another_tokenizer_is_read_by_transformers(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(shipped_path(TEACHER) / "tokenizer_2", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    loaded = load_tokenizer(folder)
    assert type(loaded).__module__.startswith("transformers")
    ours = load_tokenizer(shipped_path(TEACHER) / "tokenizer_2")
    kinds = [tokenize(each, ["a red circle"], 16, encoder="T5").tolist() for each in (ours, loaded)]
    assert kinds[0] == kinds[1]


def change_settings(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kept", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_were_added_are_left_to_transformers(tmp_path, kept):
    """As textual inversion adds them: beside a vocabulary that does not have them."""
    folder = without_json(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added, new = (
        settings["added_tokens_decoder"],
        len(json.loads((folder / "vocab.json").read_text())),
    )
    if kept == "added_tokens_decoder":
        token = {**next(iter(added.values())), "content": "<s0>", "special": False}
        change_settings(folder, added_tokens_decoder={**added, str(new): token})
    else:
        del settings["added_tokens_decoder"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "added_tokens.json").write_text(json.dumps({"<s0>": new}))
    theirs = CLIPTokenizer.from_pretrained(str(folder))
    ids = load_tokenizer(folder)(["a photo of <s0>"])["input_ids"]
    assert ids == theirs(["a photo of <s0>"])["input_ids"]
    assert new in ids[0]


def test_another_padding_token_is_left_to_transformers(tmp_path):
    folder = without_json(tmp_path)
    change_settings(folder, pad_token="!")
    theirs = CLIPTokenizer.from_pretrained(str(folder))
    assert load_tokenizer(folder)(["no!! no!"])["input_ids"] == theirs(["no!! no!"])["input_ids"]


def test_special_tokens_are_as_the_settings_say(tmp_path):
    """FLUX.1's start token is looked for in the normalised text, its end token in the text."""
    folder = without_json(tmp_path)
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    for each in added.values():
        each["normalized"] = each["content"] == "<|startoftext|>"
    change_settings(folder, added_tokens_decoder=added)
    texts = ["<|STARTOFTEXT|> a", "<|ENDOFTEXT|> a", "<|startoftext|> a <|endoftext|> b"]
    theirs = CLIPTokenizer.from_pretrained(str(folder))
    assert load_tokenizer(folder)(texts)["input_ids"] == theirs(texts)["input_ids"]


@pytest.mark.parametrize("damage", ["{", '{"<|endoftext|>": 0}'])
def test_a_damaged_vocabulary_is_one_line(tmp_path, damage):
    folder = without_json(tmp_path)
    (folder / "vocab.json").write_text(damage)
    with pytest.raises(UserError, match=f"^no usable tokenizer in {folder}: .") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="tokenizer folder .*absent does not exist"):
        load_tokenizer(tmp_path / "absent")


def test_the_limit_of_a_tokenizer():
    # transformers says "no limit" so.
    for none in (SimpleNamespace(), SimpleNamespace(model_max_length=int(1e30))):
        assert max_length(none) == 512
        assert max_length(none, 77) == 77
    assert max_length(SimpleNamespace(model_max_length=256)) == 256


@pytest.mark.parametrize(("told", "limit"), [("256", 256), ("1e30", 512), ("null", 77), ("{", 77)])
def test_the_limit_is_read_from_the_settings_where_they_tell(tmp_path, monkeypatch, told, limit):
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {told}}}')
    loaded = SimpleNamespace(model_max_length=77)
    monkeypatch.setattr("flux_jax.tokenization.load_tokenizer", lambda folder: loaded)
    assert stored_max_length(tmp_path) == limit


@pytest.mark.parametrize("told", ["-5", "0", "true", "NaN", '"77"', "[]"])
def test_a_limit_that_is_no_number_of_tokens_is_one_line(tmp_path, told):
    """It names the file: nobody gave an option."""
    folder = tmp_path / "tokenizer_2"
    shutil.copytree(shipped_path(TEACHER) / "tokenizer_2", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    change_settings(folder, **{**settings, "model_max_length": json.loads(told)})
    for read in (stored_max_length, load_tokenizer):
        with pytest.raises(UserError, match="tokenizer_config.json: model_max_length must be a "):
            read(folder)


def test_settings_nested_too_deeply_are_one_line(tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(shipped_path(TEACHER) / "tokenizer", folder)
    (folder / "tokenizer_config.json").write_text('{"a":' + "[" * 100_000)
    for read in (stored_max_length, load_tokenizer):
        with pytest.raises(UserError, match=f"^no usable tokenizer in {folder}: .") as raised:
            read(folder)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("named_by", ["tokenizer_config.json", "config.json"])
def test_no_code_of_a_folder_is_run_whatever_is_answered(tmp_path, named_by):
    folder, ran = tmp_path / "tokenizer", tmp_path / "ran"
    folder.mkdir()
    (folder / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import PretrainedConfig as Config, PreTrainedTokenizerFast as Own\n"
    )
    auto_map = {"AutoTokenizer": ["code.Own", "code.Own"], "AutoConfig": "code.Config"}
    (folder / named_by).write_text(
        json.dumps({"tokenizer_class": "Own", "model_type": "own", "auto_map": auto_map})
    )
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from flux_jax.errors import exit_on_user_error\n"
        "from flux_jax.tokenization import load_tokenizer\n"
        "with exit_on_user_error():\n    load_tokenizer(Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 2, done.stderr
    assert not ran.exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [
        f"error: no usable tokenizer in {folder}: it needs Python code of its own (`auto_map` in "
        f"{named_by}), which is never run"
    ]
    assert "[y/N]" not in done.stdout + done.stderr


def test_ids_are_padded_or_cut_to_the_length(caplog):
    tokenizer = load_tokenizer(shipped_path(TEACHER) / "tokenizer_2")
    short, long = "a red circle", "a red circle above a blue square"
    whole = tokenizer([short, long])["input_ids"]
    length = len(whole[0]) + 2
    assert len(whole[1]) > length
    ids = tokenize(tokenizer, [short, long], length, encoder="T5")
    padding = [tokenizer.pad_token_id] * 2
    assert ids[0].tolist() == [*whole[0], *padding]
    # The end token stays; a warning quotes what is not seen.
    assert ids[1].tolist() == [*whole[1][: length - 1], whole[1][-1]]
    (told,) = caplog.messages
    assert told.startswith(f"T5 reads {length - 1} tokens and this prompt has {len(whole[1]) - 1}")
    assert repr(tokenizer.decode(whole[1][length - 1 : -1])) in told
