"""The tokens whose own rows of embedding and head changed most, and those that only one side has."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from diffing_core.methods.weight_diff.change import Change
from diffing_core.methods.weight_diff.declaration import TOKEN_ROWS
from diffing_core.vocabulary import Vocabulary
from diffing_core.weights import WeightPair


@dataclass(frozen=True, eq=False)
class RowSizes:
    """What is known of some rows of one tensor, by the columns of the table; `first` is the id of the first row.

    `ranked_V` says which of them are listed first; rows of size 0 are not.
    """

    name: str
    kind: str
    first: int
    size_V: Any
    ranked_V: Any
    columns: dict[str, Any]


def sizes_of(change: Change) -> Iterator[RowSizes]:
    """The rows of one tensor, if its rows belong to tokens."""
    if not change.has_token_rows():
        return
    name, pair = change.delta.name, change.delta.pair
    if change.frobenius:
        own_V, norm_V = change.row_norms(own=True), change.row_norms()
        columns = {"own_row_norm": own_V, "row_norm": norm_V, "relative_row_norm": norm_V / change.base.norm(dim=1)}
        yield RowSizes(name, "changed", 0, norm_V, own_V, columns)
    for kind, common, rest in (("added", "tuned", "only_tuned"), ("removed", "base", "only_base")):
        rows_VD = getattr(pair, rest, None)
        if rows_VD is not None:
            norm_V, apart_V = rows_VD.norm(dim=1), (rows_VD - getattr(pair, common).mean(0)).norm(dim=1)
            columns = {"row_norm": norm_V, "norm_from_mean": apart_V}
            yield RowSizes(name, kind, len(change.base), norm_V, apart_V, columns)


def token_rows(pair: WeightPair, found: Iterable[RowSizes], n_rows: int) -> list[dict[str, Any]]:
    """At most `n_rows` rows of every tensor and kind, the largest first."""
    found = list(found) if n_rows else []
    n_tokens = max((each.first + len(each.size_V) for each in found), default=0)
    texts: dict[str, Any] = {}
    rows = []
    for each in found:
        side = "tuned" if each.kind == "added" else "base"
        if side not in texts:
            tokenizer = pair.tokenizer_of(pair.tuned) if side == "tuned" else pair.tokenizer()
            texts[side] = Vocabulary(tokenizer, n_tokens).text_V
        places = each.ranked_V.argsort(descending=True, stable=True)[:n_rows]
        for place in places[each.size_V[places] > 0].tolist():
            known = {"name": each.name, "kind": each.kind, "token_id": each.first + place}
            values = {column: value_V[place].item() for column, value_V in each.columns.items()}
            finite = {column: value if value < float("inf") else None for column, value in values.items()}
            text = {"token": texts[side][each.first + place]}
            rows.append(dict.fromkeys(TOKEN_ROWS.schema.names) | known | text | finite)
    return rows
