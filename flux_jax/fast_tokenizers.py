"""FLUX.1's two tokenizers by the `tokenizers` library alone.

transformers gives the same ids, but importing its tokenizers takes seconds, more where PyTorch is
installed, which they import; all of it in Python, so that no other thread gets on meanwhile. (After
a special token that a prompt itself spells out, such as T5's `</s>`, transformers 5 may cut words
another way than the tokenizer's file says; here the file decides, as it does in transformers 4.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"
# How CLIP cuts a text into words (openai/CLIP, simple_tokenizer.py).
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# What pads a prompt, where the folder's settings do not tell.
_PADS = {"CLIPTokenizer": _END, "T5Tokenizer": "<pad>"}
CLASSES = tuple(_PADS)


class FastTokenizer:
    """A tokenizer, with as much of a transformers tokenizer's interface as prompts need.

    Attributes:
      backend: of the `tokenizers` library.
      pad_token, pad_token_id: what fills a text up.
      model_max_length: the most tokens of a text; None if unlimited.
    """

    def __init__(self, backend: Tokenizer, *, pad_token: str, model_max_length: float | None):
        """A tokenizer that neither cuts nor pads unless asked.

        Raises:
          ValueError: the padding token is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        pad = backend.token_to_id(pad_token)
        if pad is None:
            raise ValueError(f"the padding token {pad_token!r} is not in the vocabulary")
        self.backend = backend
        self.pad_token, self.pad_token_id = pad_token, pad
        self.model_max_length = model_max_length

    def __call__(
        self,
        texts: Sequence[str],
        *,
        padding: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        verbose: bool = True,
    ) -> dict[str, list[list[int]]]:
        """Token ids of texts, as `input_ids`.

        Args:
          texts: any number.
          padding: "max_length" fills each up to `max_length`.
          max_length: tokens, special ones included.
          truncation: whether what is beyond `max_length` is cut, special tokens excepted.
          add_special_tokens: whether there are any.
          verbose: as transformers takes it; nothing is told either way.
        """
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        if truncation and max_length is not None:
            room = max_length - (self.num_special_tokens_to_add() if add_special_tokens else 0)
            for each in encoded:
                each.truncate(max(0, room))
        if add_special_tokens:
            encoded = [self.backend.post_process(each) for each in encoded]
        if padding == "max_length" and max_length is not None:
            for each in encoded:
                each.pad(max_length, pad_id=self.pad_token_id, pad_token=self.pad_token)
        return {"input_ids": [each.ids for each in encoded]}

    def num_special_tokens_to_add(self) -> int:
        """How many the tokenizer adds to a text."""
        return self.backend.num_special_tokens_to_add(False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        text = self.backend.decode(list(ids), skip_special_tokens=False)
        suffix = getattr(self.backend.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text


def load(folder: Path, name: str, settings: Callable[[str], Any]) -> FastTokenizer | None:
    """The tokenizer of a folder; None if it lacks the files that this reads.

    Args:
      folder: with `tokenizer.json`, or for CLIP `vocab.json` and `merges.txt` and no more tokens.
      name: its class, of `CLASSES`.
      settings: gives what `tokenizer_config.json` says by a name, None where it says nothing.

    Raises:
      Exception: whatever the library makes of damaged files.
    """
    import tokenizers

    pad = settings("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    whole = folder / "tokenizer.json"
    if whole.exists():
        backend = tokenizers.Tokenizer.from_file(str(whole))
    else:
        vocab, merges, added = (folder / file for file in _CLIP_FILES)
        special = _special_tokens(settings("added_tokens_decoder") or {})
        if special is None or pad not in (None, _END) or added.exists():
            return None
        if name != "CLIPTokenizer" or not vocab.exists() or not merges.exists():
            return None
        backend = _clip(vocab, merges, special)
    return FastTokenizer(
        backend, pad_token=pad or _PADS[name], model_max_length=settings("model_max_length")
    )


_CLIP_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


def _special_tokens(decoder: dict[str, dict[str, Any]]) -> list[AddedToken] | None:
    """CLIP's two, as a folder's settings have them; None if it has others (textual inversion)."""
    from tokenizers import AddedToken

    told = {each["content"]: each for each in decoder.values()}
    if told.keys() - {_START, _END}:
        return None
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return [
        AddedToken(
            content,
            special=True,
            **{flag: told.get(content, {}).get(flag, False) for flag in flags},
        )
        for content in (_START, _END)
    ]


def _clip(vocab: Path, merges: Path, special: list[AddedToken]) -> Tokenizer:
    """CLIP's byte pairs: lower case, words cut apart, the last byte of each marked."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    words, pairs = BPE.read_file(str(vocab), str(merges))
    model = BPE(
        words, pairs, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=_END
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, words[_END]), (_START, words[_START]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
