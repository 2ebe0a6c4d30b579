"""The vocabulary as people read it."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

_decoded: WeakKeyDictionary[Any, dict[int, "Vocabulary"]] = WeakKeyDictionary()


class Vocabulary:
    """Token texts, each decoded on its own, and which of them a person can read.

    Attributes:
        text_V: texts, object [V].
        readable_V: no special tokens, broken bytes or blanks, bool [V].
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.text_V = np.asarray(tokenizer.batch_decode([[number] for number in range(size)]), dtype=object)
        seen = [any(map(str.isprintable, text.strip())) and "\ufffd" not in text for text in self.text_V]
        self.readable_V = np.asarray(seen, dtype=bool)
        self.readable_V[[number for number in tokenizer.all_special_ids if number < size]] = False
        for shared in (self.text_V, self.readable_V):
            shared.flags.writeable = False

    def of(self, ids: Iterable[int]) -> list[str]:
        """Their texts."""
        return self.text_V[np.asarray(ids, dtype=np.int64)].tolist()


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """The first `size` entries, decoded once while the tokenizer lives: seconds for 150 000 of them.

    Who changes a tokenizer in place makes a `Vocabulary` anew.
    """
    of_size = _decoded.setdefault(tokenizer, {})
    if size not in of_size:
        of_size[size] = Vocabulary(tokenizer, size)
    return of_size[size]
