"""The vocabulary as people read it."""

from collections.abc import Iterable
from typing import Any

import numpy as np


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

    def of(self, ids: Iterable[int]) -> list[str]:
        """Their texts."""
        return self.text_V[np.asarray(ids, dtype=np.int64)].tolist()
