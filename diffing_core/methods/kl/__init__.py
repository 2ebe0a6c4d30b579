"""KL divergence between the two models' next-token distributions, token by token.

    kl_nats         = Σ_v p_tuned (log p_tuned − log p_base)          KL(tuned ‖ base)
    reverse_kl_nats = Σ_v p_base  (log p_base − log p_tuned)          KL(base ‖ tuned)
    js_nats         = ½ KL(p_tuned ‖ m) + ½ KL(p_base ‖ m)            m = (p_tuned + p_base)/2
    total_variation = ½ Σ_v |p_tuned − p_base|

All in float32 log-softmax, in nats per token; averages over tokens in float64. The vocabulary's mean
share Σ_t p_tuned (log p_tuned − log p_base) / n of each token is what the findings rank: it names the
tokens on which the divergence is spent. `kl_rollout` measures the same on text that the tuned model writes.

Reference: Kullback and Leibler 1951; Lin 1991.
"""

from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.methods.kl.declaration import (
    EXAMPLES,
    HOT_TOKENS,
    NATS,
    POSITIONS,
    SEQUENCES,
    TOKENS,
    VOCABULARY,
    KlSettings,
)
from diffing_core.methods.kl.fold import KlFold


def findings(tables: Tables, settings: KlSettings) -> list[Finding]:
    """Tokens that gain most of the divergence; none where the models agree."""
    rows = tables[VOCABULARY.name].slice(0, settings.shown).to_pylist()
    return [
        Finding("token", row["token"], row["contribution_nats"], NATS, VOCABULARY.name, {"token_id": row["token_id"]})
        for row in rows
        if row["contribution_nats"] > 0
    ]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Mean over sequences, with its extremes."""
    kl_S = tables[SEQUENCES.name]["kl_nats"].to_numpy()
    return {"mean_kl_nats": float(kl_S.mean()), "max_sequence_kl_nats": float(kl_S.max()), "n_sequences": len(kl_S)}


METHOD = Method(
    name="kl",
    version="5",
    kind="stream",
    needs=frozenset({Need.LOGPROBS}),
    settings=KlSettings,
    tables=(TOKENS, SEQUENCES, POSITIONS, VOCABULARY, HOT_TOKENS, EXAMPLES),
    reference="Kullback and Leibler 1951; Lin 1991",
    findings=findings,
    headline=headline,
    start=KlFold,
    figures=(Figure("line", "KL(tuned ‖ base) by position", POSITIONS, "position", "kl_nats", "speaker"),),
)
