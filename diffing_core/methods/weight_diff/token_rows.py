"""The tokens whose own rows of embedding and head changed most."""

from typing import Any

from diffing_core.methods.weight_diff.declaration import TOKEN_ROWS
from diffing_core.vocabulary import Vocabulary
from diffing_core.weights import WeightPair


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
            values = (name, number, vocabulary.text_V[number], own, norm, norm / base if base else None)
            rows.append(dict(zip(TOKEN_ROWS.schema.names, values, strict=True)))
    return rows
