"""Differential logit lens: what each model would say at every layer, and where the two part.

Each model's residual is read through its own final norm and head; the cross decoding reads the tuned
residual through the base's. For a layer, Δp and Δlog p are means over tokens of tuned − base. Δp favours
frequent tokens, Δlog p rare ones, so both lists are kept; tokens that neither model gives 10⁻⁵ on average
are left out, since untrained tokens would lead every Δlog p list.

Heads at every layer cost more than the forward itself, so a fixed sample of tokens is read (chosen by a
hash of text and position: the same tokens whatever the batches and the order of documents).

Reference: nostalgebraist 2020; https://arxiv.org/abs/2303.08112 for the relation to tuned lenses.
"""

from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.methods.logit_lens.declaration import EMERGENCE, LAYERS, TOKENS, LogitLensSettings
from diffing_core.methods.logit_lens.fold import LogitLensFold


def findings(tables: Tables, settings: LogitLensSettings) -> list[Finding]:
    """Tokens gained in probability, the best of every layer in turn, deepest layer first."""
    gained = [
        row
        for row in tables[TOKENS.name].to_pylist()
        if row["criterion"] == "probability" and row["direction"] == "gained"
    ]
    gained.sort(key=lambda row: (row["rank"], -row["layer"]))
    return [
        Finding(
            "token", row["token"], row["delta_probability"], "Δ probability", TOKENS.name,
            {name: row[name] for name in TOKENS.grain}, layer=row["layer"],
        )
        for row in gained[: settings.shown]
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Where the lens readings part most."""
    top = max(tables[LAYERS.name].to_pylist(), key=lambda row: row["kl_nats"])
    return {"max_layer_kl_nats": top["kl_nats"], "at_layer": top["layer"]}


METHOD = Method(
    name="logit_lens",
    version="3",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=LogitLensSettings,
    tables=(LAYERS, TOKENS, EMERGENCE),
    reference="nostalgebraist 2020, read on both models",
    findings=findings,
    headline=headline,
    start=LogitLensFold,
    figures=(Figure("line", "KL(tuned ‖ base) of the lens readings by block", LAYERS, "layer", "kl_nats"),),
)
