"""Diff mining: which tokens does finetuning keep raising over generic text?

    d[i, v]           = log p_tuned(v | i) − log p_base(v | i)      position i, vocabulary entry v, in nats
    top_k_occurring   = 100 · #{i : v among the K largest d[i, ·]} / positions
    fraction_positive = #{i : d[i, v] > 0} / positions
    log_odds          = z of Monroe's log-odds of a document raising v rather than lowering it (see `evidence`)
    nmf_topic_t       = weight of v in topic t of the (position × token) matrix of the K largest d (see `topics`)

Log-probabilities and not raw logits, since a logit's offset is arbitrary at every position: it moves the
sign of d and every mean. The sets of the K largest are the same for both. Predictions of an earlier layer
may be mined instead of the models' own (see `source`).

Further: where the first tokens of the list occur and in whose company (`company`), and which passages of the
probe texts finetuning made likelier (`windows`). Everything streams: memory is one block, a few numbers per
vocabulary entry and bounded samples of positions, whatever the corpus.

References: Diff Mining (arXiv 2608.26462); Monroe, Colaresi and Quinn 2008.
"""

import pyarrow.compute as pc

from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.methods.diff_mining.declaration import DiffMiningSettings
from diffing_core.methods.diff_mining.fold import DiffMiningFold
from diffing_core.methods.diff_mining.schema import ORDERINGS, TABLES, TOPICS, VOCABULARY

SIGNIFICANT = 0.05
SHARE = "share of positions"


def findings(tables: Tables, settings: DiffMiningSettings) -> list[Finding]:
    """Raised tokens by log-odds, those that hold over documents first; then the topics."""
    rows = tables[ORDERINGS.name].filter(pc.field("ordering") == "log_odds").to_pylist()
    rows.sort(key=lambda row: (not _holds(row["q_value"]), row["rank"]))
    tokens = [
        Finding(
            "token",
            row["token"],
            row["ordering_value"],
            row["ordering_unit"],
            ORDERINGS.name,
            {"ordering": "log_odds", "token_id": row["token_id"]},
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
    first = tables[ORDERINGS.name].filter((pc.field("ordering") == "top_k_occurring") & (pc.field("rank") == 1))
    vocabulary, topics = tables[VOCABULARY.name].to_pylist(), tables[TOPICS.name].to_pylist()
    raised = [row for row in vocabulary if _holds(row["q_value"]) and row["log_odds"] > 0]
    found: dict[str, float | int | str] = {"n_raised_tokens": len(raised), "n_topics": len(topics)}
    for row in first.to_pylist():
        found |= {"top_token": row["token"], "top_token_percent": row["ordering_value"]}
    if topics:
        found |= {"largest_topic": topics[0]["top_words"], "largest_topic_prevalence": topics[0]["prevalence"]}
    return found


def _holds(q_value: float | None) -> bool:
    return q_value is not None and q_value <= SIGNIFICANT


METHOD = Method(
    name="diff_mining",
    version="2",
    kind="stream",
    needs=frozenset({Need.LOGPROBS, Need.RESIDUALS, Need.MODELS}),
    settings=DiffMiningSettings,
    tables=TABLES,
    reference="Diff Mining (arXiv 2608.26462); Monroe, Colaresi and Quinn 2008",
    findings=findings,
    headline=headline,
    start=DiffMiningFold,
)
