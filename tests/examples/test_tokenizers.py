"""The tokenizers: one token a caption word, any text encodes, and transformers agrees."""

from __future__ import annotations

import re

import pytest

from examples.tiny_flux.scenes import sample_captions
from examples.tiny_flux.tokenizers import (
    build_tokenizers,
    caption_words,
    learn_merges,
    rust_tokenizers,
)
from flux_jax.composition.prompts import load_prompts

STRANGE = [
    "A Red CIRCLE above a Blue square.",
    "a zebra, isn't it? d\u00e9j\u00e0 vu \u2603 \u6f22\u5b57 99 balls {x}",
    "",
    "  two   stars ",
]


@pytest.fixture(scope="module")
def tokenizers():
    return rust_tokenizers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_tokenizers(path)
    return path


def test_every_word_of_captions_and_prompts_is_known():
    texts = sample_captions(seed=9, chunk=0, count=6000)[0]
    texts += [prompt.prompt for prompt in load_prompts()]
    used = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    assert used <= set(caption_words())
    assert len(set(caption_words()) - used) <= 3  # and hardly a word is there for nothing


def test_every_caption_word_is_one_token(tokenizers):
    t5, clip = tokenizers
    for word in caption_words():
        assert t5.encode(word).tokens == ["\u2581" + word, "</s>"]
        assert clip.encode(word).tokens == ["<|startoftext|>", word + "</w>", "<|endoftext|>"]


def test_special_ids(tokenizers):
    t5, clip = tokenizers
    assert [t5.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert t5.get_vocab_size() < 300
    # The end is the highest id: OpenAI's pooling looks for the maximum, newer code for its id.
    size = clip.get_vocab_size()
    assert size < 1000
    assert clip.token_to_id("<|startoftext|>") == size - 2
    assert clip.token_to_id("<|endoftext|>") == size - 1


def test_any_text_encodes(tokenizers):
    t5, clip = tokenizers
    assert "<unk>" not in t5.encode("a zebra, {99} times").tokens
    assert t5.encode("\u6f22").ids == [t5.token_to_id("\u2581"), 2, 1]
    end = clip.token_to_id("<|endoftext|>")
    for text in STRANGE:
        assert clip.encode(text).ids.count(end) == 1  # bytes, never the unknown token


def test_capitals_do_not_matter(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.encode(STRANGE[0]).ids == tokenizer.encode(STRANGE[0].lower()).ids


def test_merges_make_whole_words():
    words = ["star", "start", "tart", "art", "stars"]
    merges = learn_merges(words)
    assert {"".join(pair) for pair in merges} >= {word + "</w>" for word in words}


def test_transformers_reads_the_same_ids(folder, tokenizers):
    transformers = pytest.importorskip("transformers")
    texts = sample_captions(seed=9, chunk=0, count=300)[0] + STRANGE
    for name, number, classes in (
        ("tokenizer_2", 0, ("T5TokenizerFast", "AutoTokenizer")),
        ("tokenizer", 1, ("CLIPTokenizer", "AutoTokenizer")),
    ):
        expected = [encoding.ids for encoding in tokenizers[number].encode_batch(texts)]
        for kind in classes:
            loaded = getattr(transformers, kind).from_pretrained(folder / name)
            assert [list(ids) for ids in loaded(texts).input_ids] == expected
            # Decoding puts spaces around signs, as the original tokenizers do; words stay.
            for text, ids in zip(texts[:300], expected, strict=False):
                decoded = loaded.decode(ids, skip_special_tokens=True)
                assert re.findall(r"\w+|[.,]", decoded) == re.findall(r"\w+|[.,]", text.lower())
            padded = loaded(texts[:2], padding="max_length", truncation=True).input_ids
            assert [len(ids) for ids in padded] == [(40, 77)[number]] * 2
            assert padded[0][-1] == loaded.pad_token_id
            assert len(loaded) == tokenizers[number].get_vocab_size()


def test_files_are_small(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert max(path.stat().st_size for path in files) < 60_000


def test_building_twice_gives_the_same_files(folder, tmp_path):
    build_tokenizers(tmp_path)
    for path in folder.rglob("*.*"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()
