"""Sizes of a model, told from the names and shapes of its tensors."""

import re
from collections.abc import Iterable


def count(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are: one more than the largest n of `prefix.n.`; 0 without any.

    Args:
      names: of the tensors.
      prefix: regular expression, matched from the start of a name.
    """
    found = (re.match(prefix + r"\.(\d{1,4})\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
