"""The two tokenizers of the tiny model, in the files that `transformers` reads.

T5: a Unigram model in which every caption word is one piece and single characters are the
fallback; what is no ASCII sign becomes <unk>, as in T5. It folds capitals, as CLIP does.
CLIP: a byte-level BPE whose merges make every caption word one token; bytes are the
fallback. Both come from the word tables of `captions`, so the same source gives the same files.

    python -m examples.tiny_flux.tokenizers OUT     # writes OUT/tokenizer and OUT/tokenizer_2
"""

from __future__ import annotations

import json
import string
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from examples.tiny_flux import captions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T5_MAX_LENGTH = 40
CLIP_MAX_LENGTH = 77
PAD, T5_END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5
SPACE = "\u2581"  # SentencePiece's mark of a word's beginning
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def caption_words() -> list[str]:
    """Every word that a caption can hold, lower case, sorted."""
    texts = [captions.TEMPLATE_WORDS, *captions.OPENINGS]
    texts += [text.format("") for text in captions.BACKGROUND_ENDINGS]
    texts += [text.format("") for text in captions.BACKGROUND_STARTS]
    for forms in captions.SHAPE_WORDS.values():
        texts += [word for form in forms for word in form]
    tables: tuple[Any, ...] = (
        captions.COLOR_WORDS, captions.SIZE_WORDS, captions.BACKGROUND_WORDS,
        captions.NUMBER_WORDS, captions.RELATION_WORDS,
    )  # fmt: skip
    texts += [word for table in tables for words in table.values() for word in words]
    return sorted({word for text in texts for word in text.replace(",", " ").split()})


def _fold_capitals() -> bytes:
    """A-Z to a-z as SentencePiece's precompiled map.

    A plain lower-case normaliser would not do: T5Tokenizer of transformers 5 rebuilds the
    backend and keeps no other kind of normaliser than this one. The map is a Darts double array
    of 32-bit units behind its length in bytes, followed by the replacements, each ended by NUL.
    A child's unit stands at (parent's position xor parent's offset xor key byte) and holds the
    byte in bits 0-7, "ends a key" in bit 8 and its own offset from bit 10; a value's unit, at
    (position xor offset), is the place of the replacement with bit 31 set.
    """
    children, values = 256, 512  # two rows of 256 units after the root's
    units = [0] * 768  # every xor with a byte stays inside, also after a match
    units[0] = children << 10
    for number, capital in enumerate(string.ascii_uppercase.encode()):
        at = children ^ capital
        units[at] = capital | 1 << 8 | (at ^ (values + number)) << 10
        units[values + number] = 2 * number | 1 << 31
    trie = struct.pack(f"<{len(units)}I", *units)
    replacements = "".join(letter + "\0" for letter in string.ascii_lowercase)
    return struct.pack("<I", len(trie)) + trie + replacements.encode()


def t5_pieces() -> list[tuple[str, float]]:
    """Pieces with log probabilities: a known word always beats spelling it out."""
    words = [(SPACE + word, -4.0) for word in caption_words()]
    characters = sorted(set(map(chr, range(33, 127))) - set(string.ascii_uppercase))
    return [
        (PAD, 0.0), (T5_END, 0.0), (UNKNOWN, 0.0), (SPACE, -5.0),
        *words, *((character, -8.0) for character in characters),
    ]  # fmt: skip


def t5_tokenizer() -> Tokenizer:
    """The T5 tokenizer of the `tokenizers` library."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokenizer = Tokenizer(models.Unigram(t5_pieces(), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(_fold_capitals())
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", T5_END], pair=["$A", T5_END, "$B", T5_END], special_tokens=[(T5_END, 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, T5_END, UNKNOWN)]
    )
    return tokenizer


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each of the 256 bytes, which CLIP's vocabulary is made of."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = {byte: chr(byte) for byte in printable}, 256
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(spare)
            spare += 1
    return [letters[byte] for byte in range(256)]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each of the words is one token.

    The most frequent pair is merged first, ties by spelling. Applying the merges in this order
    repeats what happened to each word here, so each ends as one token.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in spelled for pair in zip(parts, parts[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in spelled:
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges. The two special tokens come last, the end highest, as in CLIP."""
    # CLIP's pattern splits digits and signs off, so only words of letters need merges.
    merges = learn_merges(word for word in caption_words() if word.isalpha())
    letters = byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += list(dict.fromkeys("".join(pair) for pair in merges))
    tokens += [CLIP_START, CLIP_END]
    return {token: index for index, token in enumerate(tokens)}, merges


def clip_tokenizer() -> Tokenizer:
    """The CLIP tokenizer of the `tokenizers` library."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    vocabulary, merges = clip_vocabulary()
    model = models.BPE(
        vocab=vocabulary, merges=merges, continuing_subword_prefix="",
        end_of_word_suffix=WORD_END, fuse_unk=False, unk_token=CLIP_END,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    # CLIP's rule: the special tokens, English contractions, runs of letters, single digits, signs.
    special = "|".join(name.replace("|", r"\|") for name in (CLIP_START, CLIP_END))
    words = Regex(special + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, vocabulary[CLIP_END]), (CLIP_START, vocabulary[CLIP_START]),
        trim_offsets=False, add_prefix_space=False,
    )  # fmt: skip
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (CLIP_START, CLIP_END)]
    )
    return tokenizer


def rust_tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """(T5, CLIP) without `transformers`, for encoding in bulk."""
    return t5_tokenizer(), clip_tokenizer()


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    separators = None if indent else (",", ":")
    text = json.dumps(value, indent=indent, ensure_ascii=False, separators=separators)
    path.write_text(text + "\n", encoding="utf-8")


def _added(vocabulary: dict[str, int], tokens: Iterable[str]) -> dict[str, dict[str, Any]]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(vocabulary[token]): {"content": token, **flags, "special": True} for token in tokens
    }


def build_tokenizers(out_dir: str | Path) -> None:
    """Write `tokenizer` (CLIP) and `tokenizer_2` (T5) into a diffusers folder."""
    t5, clip = rust_tokenizers()

    folder = Path(out_dir, "tokenizer_2")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", json.loads(t5.to_str()), indent=None)
    names = {"eos_token": T5_END, "pad_token": PAD, "unk_token": UNKNOWN}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": _added(t5.get_vocab(), (PAD, T5_END, UNKNOWN)),
            "additional_special_tokens": [],
            "clean_up_tokenization_spaces": False,
            **names,
            "extra_ids": 0,
            "legacy": False,
            "model_max_length": T5_MAX_LENGTH,
            "tokenizer_class": "T5Tokenizer",
        },
    )

    folder = Path(out_dir, "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    _write_json(folder / "vocab.json", vocabulary, indent=None)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer.json", json.loads(clip.to_str()), indent=None)
    names = {
        "bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END,
        "unk_token": CLIP_END,
    }  # fmt: skip
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": _added(vocabulary, (CLIP_START, CLIP_END)),
            **names,
            "clean_up_tokenization_spaces": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": CLIP_MAX_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def main(out: Annotated[Path, typer.Argument(help="A diffusers model folder.")]) -> None:
    """Write both tokenizers."""
    build_tokenizers(out)


if __name__ == "__main__":
    typer.run(main)
