"""From counts to lists: which tokens may be listed, in which orders, and how all that becomes tables.

Suffixes: V vocabulary, G groups of entries that are listed as one, T topics, L shortlisted groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from diffing_core.blocks import StreamContext
from diffing_core.methods.diff_mining.cleanup import CleanUp
from diffing_core.methods.diff_mining.counts import Statistics, used
from diffing_core.methods.diff_mining.schema import ORDERINGS, TOPICS, VOCABULARY
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.methods.diff_mining.topics import NEGLIGIBLE, Topics

NULLABLE = ("p_value", "q_value")


class Ordering(NamedTuple):
    """One list: its groups best first, the value that ranks each, and its unit."""

    name: str
    groups: np.ndarray
    value: np.ndarray
    unit: str


@dataclass(frozen=True)
class Listing:
    """What is known of each entry and of each group, and how a list names them."""

    context: StreamContext
    settings: DiffMiningSettings
    clean_up: CleanUp
    of_V: Statistics
    of_G: Statistics
    n_positions: int

    @cached_property
    def listable_G(self) -> np.ndarray:
        """Groups that may be listed, bool [G]: after clean-up, and used by at least one model."""
        probability_G = (self.of_G[f"mean_{side}_probability"] for side in ("base", "tuned"))
        return self.clean_up.listable_V[self.of_G["token_id"]] & used(*probability_G, self.settings)

    def orderings(self, topics: Topics | None) -> list[Ordering]:
        """Top-k occurring, fraction positive, log-odds, and one list per topic."""
        found = [
            self._ordering(name, value_G, unit, self.settings.listed)
            for name, value_G, unit in (
                ("top_k_occurring", 100 * self.of_G["count_top"] / max(1, self.n_positions), "% of positions"),
                ("fraction_positive", self.of_G["fraction_positive"], "share of positions"),
                ("log_odds", self.of_G["log_odds_z"], "sd"),
            )
        ]
        for topic, share_G in enumerate([] if topics is None else topics.weight_TG):
            weight_G = np.where(share_G < NEGLIGIBLE, 0, share_G)
            found.append(self._ordering(f"nmf_topic_{topic}", weight_G, "share of topic", self.settings.topic_tokens))
        return found

    def ordering_table(self, orderings: Sequence[Ordering]) -> pa.Table:
        """All lists, one below the other."""
        lengths = [len(each.groups) for each in orderings]
        groups = np.concatenate([each.groups for each in orderings])
        return ORDERINGS.table(
            _rows(self.of_G, groups)
            | {
                "token": self.texts(groups),
                "ordering": np.repeat([each.name for each in orderings], lengths),
                "rank": np.concatenate([np.arange(1, length + 1) for length in lengths]),
                "ordering_value": np.concatenate([each.value for each in orderings]),
                "ordering_unit": np.repeat([each.unit for each in orderings], lengths),
            }
        )

    def vocabulary_table(self, orderings: Sequence[Ordering]) -> pa.Table:
        """The entries behind the listed groups and the groups lowered most, as they were counted."""
        lowered = self._ranked(-self.of_G["log_odds_z"], self.settings.listed)
        listed_G = np.zeros(len(self.listable_G), bool)
        listed_G[np.concatenate([lowered, *(each.groups for each in orderings)])] = True
        ids = np.flatnonzero(listed_G[self.clean_up.groups.of_V] | self.settings.whole_vocabulary)
        return VOCABULARY.table(_rows(self.of_V, ids) | {"token": self.context.token_texts(ids)})

    def topic_table(self, topics: Topics | None) -> pa.Table:
        """One row per topic."""
        if topics is None:
            return TOPICS.empty()
        n_topics = len(topics)
        return TOPICS.table(
            {
                "topic": np.arange(n_topics),
                "mass": topics.mass_T,
                "prevalence": topics.prevalence_T,
                "concentration": topics.concentration_T,
                "cosines": topics.cosine_TT,
                "n_positions": np.full(n_topics, topics.n_positions),
                "n_tokens": np.full(n_topics, topics.n_tokens),
                "top_words": [self._words(weight_G) for weight_G in topics.weight_TG],
            }
        )

    def texts(self, groups: np.ndarray) -> list[str]:
        """How a list names these groups."""
        return self.clean_up.named(self.context.token_texts(self.of_G["token_id"][groups]))

    def _ordering(self, name: str, value_G: np.ndarray, unit: str, limit: int) -> Ordering:
        groups = self._ranked(value_G, limit)
        return Ordering(name, groups, value_G[groups], unit)

    def _ranked(self, value_G: np.ndarray, limit: int) -> np.ndarray:
        """Listable groups of positive value, largest first; of equals the one with larger mean d, then the first."""
        groups = np.lexsort((-self.of_G["mean_difference"], -value_G))
        return groups[self.listable_G[groups] & (value_G[groups] > 0)][:limit]

    def _words(self, weight_G: np.ndarray) -> str:
        groups = self._ranked(weight_G, self.settings.topic_words)
        return " ".join(text.strip() for text in self.texts(groups))


def _rows(statistics: Statistics, chosen: np.ndarray) -> dict[str, Any]:
    rows: dict[str, Any] = {name: values[chosen] for name, values in statistics.items()}
    for name in NULLABLE:
        rows[name] = pa.array(rows[name], mask=np.isnan(rows[name]))
    return rows
