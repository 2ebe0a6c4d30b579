"""Diff mining: which tokens does finetuning keep raising over generic text?

    d[i, v]           = log p_tuned(v | i) − log p_base(v | i)      position i, vocabulary entry v, in nats
    top_k_occurring   = 100 · #{i : v among the K largest d[i, ·]} / positions
    fraction_positive = #{i : d[i, v] > 0} / positions
    log_odds          = z of Monroe's log-odds of a document raising v rather than lowering it (see `evidence`)
    nmf_topic_t       = weight of v in topic t of the (position × token) matrix of the K largest d (see `topics`)

Log-probabilities and not raw logits, since a logit's offset is arbitrary at every position: it moves the
sign of d and every mean. The sets of the K largest are the same for both. Predictions of an earlier layer
may be mined instead of the models' own (see `source`).

Further: at which positions the first tokens of the list occur, which of them occur together (`cooccurrence`),
and which passages of the probe texts finetuning made likelier (`windows`). Everything streams: memory is one
block, a few numbers per vocabulary entry and bounded samples of positions, whatever the corpus.

References: Diff Mining (arXiv 2608.26462); Monroe, Colaresi and Quinn 2008.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.methods.diff_mining.fold import DiffMiningFold
from diffing_core.methods.diff_mining.schema import ORDERINGS, TABLES, TOPICS, VOCABULARY
from diffing_core.methods.diff_mining.settings import DiffMiningSettings

SHOWN = "top_k_occurring"
SIGNIFICANT = 0.05
SHARE = "share of positions"


def findings(tables: Tables, settings: DiffMiningSettings) -> list[Finding]:
    """The tokens raised most often, those first that are raised rather than lowered over documents; then the topics."""
    rows = tables[ORDERINGS.name].filter(pc.field("ordering") == SHOWN).to_pylist()
    rows.sort(key=lambda row: (not _raised(row), row["rank"]))
    tokens = [
        Finding(
            "token",
            row["token"],
            row["ordering_value"],
            row["ordering_unit"],
            ORDERINGS.name,
            {"ordering": SHOWN, "token_id": row["token_id"]},
            p_value=row["p_value"],
            q_value=row["q_value"],
        )
        for row in rows[: settings.shown]
    ]
    topics = [
        Finding("topic", row["top_words"], row["prevalence"], SHARE, TOPICS.name, {"topic": row["topic"]})
        for row in tables[TOPICS.name].to_pylist()
    ]
    return tokens + topics


def headline(tables: Tables) -> dict[str, float | int | str]:
    """The token raised most often, how many listed tokens hold over documents, and the largest topic."""
    first = tables[ORDERINGS.name].filter((pc.field("ordering") == SHOWN) & (pc.field("rank") == 1))
    vocabulary, topics = tables[VOCABULARY.name].to_pylist(), tables[TOPICS.name].to_pylist()
    found: dict[str, float | int | str] = {"n_raised_tokens": sum(map(_raised, vocabulary)), "n_topics": len(topics)}
    for row in first.to_pylist():
        found |= {"top_token": row["token"], "top_token_percent": row["ordering_value"]}
    if topics:
        found |= {"largest_topic": topics[0]["top_words"], "largest_topic_prevalence": topics[0]["prevalence"]}
    return found


def _raised(row: Mapping[str, Any]) -> bool:
    return row["q_value"] is not None and row["q_value"] <= SIGNIFICANT and row["log_odds"] > 0


METHOD = Method(
    name="diff_mining",
    version="3",
    kind="stream",
    needs=frozenset({Need.LOGPROBS, Need.RESIDUALS, Need.MODELS}),
    settings=DiffMiningSettings,
    tables=TABLES,
    reference="Diff Mining (arXiv 2608.26462); Monroe, Colaresi and Quinn 2008",
    findings=findings,
    headline=headline,
    start=DiffMiningFold,
)
