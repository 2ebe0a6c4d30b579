"""The vocabulary as people read it, and the tokens whose own rows changed most."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from diffing_core.methods.weight_diff.declaration import TOKEN_ROWS
from diffing_core.weights import WeightPair


class Vocabulary:
    """Token texts, and which of them a person can read: no special tokens, broken bytes, blanks."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.texts = tokenizer.batch_decode([[number] for number in range(size)])
        seen = [any(map(str.isprintable, text.strip())) and "\ufffd" not in text for text in self.texts]
        self.readable_V = np.asarray(seen, dtype=bool)
        self.readable_V[[number for number in tokenizer.all_special_ids if number < size]] = False

    def of(self, ids: Iterable[int]) -> list[str]:
        """Their texts."""
        return [self.texts[number] for number in ids]


def token_rows(pair: WeightPair, changed: list[tuple[str, Any]], n_rows: int) -> list[dict[str, Any]]:
    """The rows of embedding and head that changed most; [3, V] holds own change, whole change and base."""
    if not changed or not n_rows:
        return []
    vocabulary = Vocabulary(pair.tokenizer(), max(sizes.shape[1] for _, sizes in changed))
    rows = []
    for name, sizes_3V in changed:
        ids = sizes_3V[0].argsort(descending=True, stable=True)[:n_rows]
        for number in ids[sizes_3V[1, ids] > 0].tolist():
            own, norm, base = sizes_3V[:, number].tolist()
            values = (name, number, vocabulary.texts[number], own, norm, norm / base if base else None)
            rows.append(dict(zip(TOKEN_ROWS.schema.names, values, strict=True)))
    return rows
