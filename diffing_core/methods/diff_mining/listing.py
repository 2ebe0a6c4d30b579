"""From counts to lists: which tokens may be listed, what is known of each, and their orders.

Suffixes: N tokens of a block, V vocabulary, K top-k, G groups of tokens that count as one, T topics.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.methods.base import Tables
from diffing_core.methods.diff_mining.declaration import ORDERINGS, STATISTICS, TOPICS, VOCABULARY, DiffMiningSettings
from diffing_core.methods.diff_mining.evidence import DocumentCounts, log_odds, q_values, sign_flip_p_values
from diffing_core.methods.diff_mining.topics import NEGLIGIBLE, Topics

NULLABLE = ("p_value", "q_value")


@dataclass
class TokenSums:
    """Sums over all positions, per vocabulary entry [V]."""

    difference_V: np.ndarray
    base_V: np.ndarray
    tuned_V: np.ndarray
    positive_V: np.ndarray
    top_V: np.ndarray
    bottom_V: np.ndarray
    n_positions: int = 0

    @classmethod
    def zeros(cls, vocab_size: int) -> "TokenSums":
        """Nothing added yet."""
        sums = (np.zeros(vocab_size) for _ in range(3))
        counts = (np.zeros(vocab_size, np.int64) for _ in range(3))
        return cls(*sums, *counts)

    def add(self, block: TokenBlock, difference_NV: Any, top_NK: np.ndarray, bottom_NK: np.ndarray) -> None:
        """Adds the N positions of a block; the ids at both ends may be of fewer."""
        self.difference_V += _over_positions(difference_NV)
        self.base_V += _over_positions(block.base.probability_NV)
        self.tuned_V += _over_positions(block.tuned.probability_NV)
        self.positive_V += (difference_NV > 0).sum(0).cpu().numpy()
        self.top_V += np.bincount(top_NK.ravel(), minlength=len(self.top_V))
        self.bottom_V += np.bincount(bottom_NK.ravel(), minlength=len(self.bottom_V))
        self.n_positions += len(block)


@dataclass(frozen=True)
class Listing:
    """What is known of each group [G], by column name of the vocabulary table, and which may be listed."""

    context: StreamContext
    settings: DiffMiningSettings
    columns_G: Mapping[str, np.ndarray]
    listable_G: np.ndarray
    n_positions: int

    @classmethod
    def of(
        cls,
        context: StreamContext,
        settings: DiffMiningSettings,
        group_V: np.ndarray,
        sums: TokenSums,
        documents: DocumentCounts,
    ) -> "Listing":
        """Merges the tokens of each group: counts and probabilities add up, differences are averaged."""
        columns_G = _merged(group_V, sums)
        likely_G = np.maximum(columns_G["mean_base_probability"], columns_G["mean_tuned_probability"])
        listable_G = likely_G >= settings.min_probability
        if settings.readable_only:
            listable_G &= context.readable_V[columns_G["token_id"]]
        columns_G |= _tested(columns_G, documents, listable_G, settings)
        return cls(context, settings, columns_G, listable_G, sums.n_positions)

    def tables(self, topics: Topics | None) -> Tables:
        """The three tables."""
        lists = list(self._orderings(topics))
        return {
            ORDERINGS.name: self._ordering_table(lists),
            VOCABULARY.name: self._vocabulary([groups for _, groups, _, _ in lists]),
            TOPICS.name: self._topics(topics),
        }

    def _orderings(self, topics: Topics | None) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        """Name, groups best first, their values and the unit, of each ordering."""
        columns, listed = self.columns_G, self.settings.listed
        percent_G = 100 * columns["count_top"] / max(1, self.n_positions)
        for name, value_G, unit in (
            ("top_k_occurring", percent_G, "% of positions"),
            ("fraction_positive", columns["fraction_positive"], "share of positions"),
            ("log_odds", columns["log_odds_z"], "sd"),
        ):
            groups = self._ranked(value_G, listed)
            yield name, groups, value_G[groups], unit
        for topic, weight_G in enumerate([] if topics is None else topics.weight_TG):
            groups = self._ranked(np.where(weight_G < NEGLIGIBLE, 0, weight_G), self.settings.topic_tokens)
            yield f"nmf_topic_{topic}", groups, weight_G[groups], "share of topic"

    def _ranked(self, value_G: np.ndarray, limit: int) -> np.ndarray:
        """Listable groups of positive value, largest first; of equals the one raised more on average, then the first."""
        groups = np.lexsort((-self.columns_G["mean_logprob_difference"], -value_G))
        return groups[self.listable_G[groups] & (value_G[groups] > 0)][:limit]

    def _ordering_table(self, lists: list[tuple[str, np.ndarray, np.ndarray, str]]) -> pa.Table:
        lengths = [len(groups) for _, groups, _, _ in lists]
        groups = np.concatenate([groups for _, groups, _, _ in lists])
        return ORDERINGS.table(
            self._rows(groups, ["token_id", *(column.name for column in STATISTICS)])
            | {
                "ordering": np.repeat([name for name, *_ in lists], lengths),
                "rank": np.concatenate([np.arange(1, length + 1) for length in lengths]),
                "ordering_value": np.concatenate([value for _, _, value, _ in lists]),
                "ordering_unit": np.repeat([unit for *_, unit in lists], lengths),
            }
        )

    def _vocabulary(self, lists: list[np.ndarray]) -> pa.Table:
        lowered = self._ranked(-self.columns_G["log_odds_z"], self.settings.listed)
        groups = np.unique(np.concatenate([*lists, lowered]))
        if self.settings.whole_vocabulary:
            groups = np.arange(len(self.listable_G))
        return VOCABULARY.table(self._rows(groups, list(self.columns_G)))

    def _topics(self, topics: Topics | None) -> pa.Table:
        if topics is None:
            return TOPICS.empty()
        n_topics = len(topics)
        return TOPICS.table(
            {
                "topic": np.arange(n_topics),
                "mass": topics.mass_T,
                "prevalence": topics.prevalence_T,
                "concentration": topics.concentration_T,
                "largest_cosine": topics.largest_cosine_T,
                "n_positions": np.full(n_topics, topics.n_positions),
                "n_tokens": np.full(n_topics, topics.n_tokens),
                "top_words": [self._words(weight_G) for weight_G in topics.weight_TG],
            }
        )

    def _words(self, weight_G: np.ndarray) -> str:
        groups = self._ranked(weight_G, self.settings.topic_words)
        return " ".join(text.strip() for text in self._texts(groups))

    def _rows(self, groups: np.ndarray, names: list[str]) -> dict[str, Any]:
        rows: dict[str, Any] = {name: self.columns_G[name][groups] for name in names}
        for name in set(NULLABLE) & set(names):
            rows[name] = pa.array(rows[name], mask=np.isnan(rows[name]))
        return rows | {"token": self._texts(groups)}

    def _texts(self, groups: np.ndarray) -> list[str]:
        texts = self.context.token_texts(self.columns_G["token_id"][groups])
        return [text.strip().lower() for text in texts] if self.settings.merge_variants else texts


def groups_of(context: StreamContext, *, merge_variants: bool) -> np.ndarray:
    """The group of each vocabulary entry, int64 [V]: itself, or all readable entries of the same bare text."""
    ids = np.arange(context.vocab_size)
    if not merge_variants:
        return ids
    texts = zip(context.token_texts(ids), context.readable_V, ids, strict=True)
    keys = np.asarray([text.strip().lower() if readable else f"\0{token}" for text, readable, token in texts])
    return np.unique(keys, return_inverse=True)[1]


def _merged(group_V: np.ndarray, sums: TokenSums) -> dict[str, np.ndarray]:
    members_G = np.bincount(group_V)
    n_positions = max(1, sums.n_positions)
    top_G, bottom_G = (np.bincount(group_V, counts).astype(np.int64) for counts in (sums.top_V, sums.bottom_V))
    return {
        "token_id": _most_frequent(group_V, sums.top_V + sums.bottom_V),
        "mean_logprob_difference": np.bincount(group_V, sums.difference_V) / members_G / n_positions,
        "count_top": top_G,
        "count_bottom": bottom_G,
        "fraction_positive": np.bincount(group_V, sums.positive_V) / members_G / n_positions,
        "mean_base_probability": np.bincount(group_V, sums.base_V) / n_positions,
        "mean_tuned_probability": np.bincount(group_V, sums.tuned_V) / n_positions,
    }


def _tested(
    columns_G: Mapping[str, np.ndarray], documents: DocumentCounts, listable_G: np.ndarray, settings: DiffMiningSettings
) -> dict[str, np.ndarray]:
    """Log-odds of all groups, p and q of the listable ones in enough documents (a choice blind to signs)."""
    top_G, bottom_G = columns_G["count_top"], columns_G["count_bottom"]
    squares_G, n_documents_G = documents.moments()
    tested_G = listable_G & (n_documents_G >= settings.min_documents)
    odds_G, z_G = log_odds(top_G, bottom_G, settings.prior_weight)
    p_G = np.where(tested_G, sign_flip_p_values(top_G - bottom_G, squares_G), np.nan)
    return {
        "log_odds": odds_G,
        "log_odds_z": z_G,
        "n_documents": n_documents_G,
        "p_value": p_G,
        "q_value": q_values(p_G, tested_G),
    }


def _most_frequent(group_V: np.ndarray, occurrences_V: np.ndarray) -> np.ndarray:
    """The member of each group that occurs most, of equals the lowest id, [G]."""
    order = np.lexsort((-occurrences_V, group_V))
    return order[np.unique(group_V[order], return_index=True)[1]]


def _over_positions(values_NV: Any) -> np.ndarray:
    return values_NV.sum(0).double().cpu().numpy()
