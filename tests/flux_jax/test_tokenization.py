"""Tokenizers from folders as they may be: damaged, absent, without a limit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

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


THREADS = """
import sys, threading, time
from pathlib import Path
from flux_jax.tokenization import import_tokenizers, load_tokenizer
thread = threading.Thread(target=import_tokenizers)
thread.start()
time.sleep(float(sys.argv[2]))
for name in ("tokenizer", "tokenizer_2"):
    print(type(load_tokenizer(Path(sys.argv[1]) / name)).__name__)
thread.join()
"""


@pytest.mark.parametrize("later", [0.3, 0.8])
def test_one_thread_imports_what_another_needs(later):
    """Without a lock transformers would have no such class for the second of them."""
    command = [sys.executable, "-c", THREADS, str(shipped_path(TEACHER)), str(later)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split() == ["CLIPTokenizer", "T5Tokenizer"]


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
