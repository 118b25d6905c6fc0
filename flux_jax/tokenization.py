"""Prompts to token ids, through the tokenizers that ship with a checkpoint."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from flux_jax import fast_tokenizers
from flux_jax.errors import UserError
from flux_jax.json_values import parse_json

logger = logging.getLogger(__name__)

# The longest prompts FLUX.1-dev and -schnell were trained with, in T5 tokens.
DEV_TOKENS, SCHNELL_TOKENS = 512, 256
# transformers says "no limit" with a huge number.
_NO_LIMIT = 1_000_000
# What a tokenizer's folder says of itself.
_SETTINGS = "tokenizer_config.json"


# transformers imports its modules when their names are first asked for, and says that there is no
# such name to a thread that asks while another one imports.
_IMPORTING = threading.Lock()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a local folder, read without touching the network.

    FLUX.1's own are a `flux_jax.fast_tokenizers.FastTokenizer`; any other is one of transformers'.
    No Python code of a folder is ever run.

    Raises:
      UserError: the folder is missing or holds no tokenizer that can be read, or one that needs
        code of its own.
    """
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist")
    _stored_limit(folder)
    name = _class_name(folder)
    try:
        fast = None
        if name in fast_tokenizers.CLASSES:
            fast = fast_tokenizers.load(folder, name, functools.partial(_setting, folder))
        return _by_transformers(folder) if fast is None else fast
    # Whatever a damaged file makes of it: `tokenizers` raises plain `Exception`.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"no usable tokenizer in {folder}: {reason}") from error


def _by_transformers(folder: Path) -> Any:
    with _IMPORTING:
        # It would say, at its import, that models need PyTorch; tokenizers do not.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # Late: importing it takes seconds, more where PyTorch is installed, which it imports.
        from transformers import AutoTokenizer

        # Left out, transformers would ask on the terminal whether to run a folder's code.
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            return AutoTokenizer.from_pretrained(str(folder), **options)
        except Exception as error:
            for file in (_SETTINGS, "config.json"):
                if _setting(folder, "auto_map", file) is not None:
                    raise UserError(
                        f"it needs Python code of its own (`auto_map` in {file}), which is never "
                        "run"
                    ) from error
            raise


def _class_name(folder: Path) -> str | None:
    """The class that a tokenizer's folder names, as transformers calls it since version 5."""
    name = _setting(folder, "tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _setting(folder: Path, name: str, file: str = _SETTINGS) -> Any:
    """What a tokenizer's folder says of itself; None where it does not."""
    try:
        return parse_json((folder / file).read_bytes(), folder / file)[name]
    # A file that is damaged as a whole is told by whoever reads the tokenizer.
    except (OSError, UserError, KeyError, TypeError):
        return None


def max_length(tokenizer: Any, otherwise: int = DEV_TOKENS) -> int:
    """The tokenizer's own length limit, or `otherwise` if it has none."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < _NO_LIMIT else otherwise


def stored_max_length(folder: Path, otherwise: int = DEV_TOKENS) -> int:
    """`max_length` of the tokenizer in a folder, which is not loaded where its settings tell.

    Raises:
      UserError: as `load_tokenizer`.
    """
    limit = _stored_limit(folder)
    if limit is None:
        return max_length(load_tokenizer(folder), otherwise)
    return int(limit) if limit < _NO_LIMIT else otherwise


def _stored_limit(folder: Path) -> float | None:
    """The length limit that a tokenizer's folder states; None where it does not.

    Raises:
      UserError: it is no number of tokens.
    """
    limit = _setting(folder, "model_max_length")
    # Python's True is an int, and its NaN no less than anything.
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit is not None and not (is_number and limit >= 1):
        raise UserError(
            f"{folder / _SETTINGS}: model_max_length must be a number of tokens, got "
            f"{ascii(limit)[:40]}"
        )
    return limit


def tokenize(
    tokenizer: Any, prompts: Sequence[str], length: int, *, encoder: str
) -> Int[np.ndarray, "B T"]:
    """Token ids of fixed length, padded at the end.

    A prompt that does not fit is cut, and a warning quotes what the model will not see.

    Args:
      tokenizer: as `load_tokenizer` gives, or one of transformers'.
      prompts: B texts.
      length: tokens per prompt, special tokens included.
      encoder: the text encoder's name in the warning, "T5" or "CLIP".

    Returns:
      (B, length) int32.
    """
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    room = length - tokenizer.num_special_tokens_to_add()
    content = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    for prompt, ids in zip(prompts, content, strict=True):
        if len(ids) > room:
            logger.warning(
                "%s reads %d tokens and this prompt has %d; not seen: %r (of %r)",
                encoder,
                room,
                len(ids),
                _short(tokenizer.decode(ids[room:])),
                _short(prompt),
            )
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
